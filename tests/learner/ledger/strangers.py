"""A peer that sends what it likes to the real ledger, and one beside it that has to be served."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import zmq.asyncio

from common import wire
from common.rendezvous import Rendezvous, RunKeys
from common.transport import SILENCE_S, Client

STATUS = wire.Status()


class Attacker:
    """A DEALER that sends what it likes."""

    def __init__(self, run_dir: Path, keys: RunKeys | None, server: str = "") -> None:
        self.context = zmq.asyncio.Context()
        self._socket = self.context.socket(zmq.DEALER)
        self._socket.linger = 0
        if keys is not None:
            self._socket.curve_publickey, self._socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
            self._socket.curve_serverkey = (server or RunKeys.load(run_dir).public).encode()
        self._socket.connect(Rendezvous.read(run_dir).address)

    async def send(self, *frames: bytes) -> None:
        await self._socket.send_multipart(frames)

    async def ask(self, data: bytes) -> wire.Message:
        await self.send(b"request0", data)
        while not (answer := (await asyncio.wait_for(self._socket.recv_multipart(), 10))[1]):
            pass
        return wire.decode(answer)

    def close(self) -> None:
        self.context.destroy(linger=0)


@asynccontextmanager
async def undisturbed(client: Client) -> AsyncGenerator[None]:
    """A healthy peer on the same socket is answered all the while, before it would take the ledger for dead."""

    async def ask() -> int:
        for number in range(1_000_000):
            began = time.monotonic()
            await client.ask_once(STATUS, wire.StatusReport, silence_s=SILENCE_S)
            assert time.monotonic() - began < SILENCE_S
            if done.is_set():
                return number
            await asyncio.sleep(0.01)
        raise AssertionError

    done = asyncio.Event()
    asking = asyncio.create_task(ask())
    await asyncio.sleep(0)
    yield
    done.set()
    assert await asking > 0


async def refused(client: Client) -> dict[str, int]:
    return (await client.ask(STATUS, wire.StatusReport, deadline_s=30)).refused


async def wait_for(client: Client, kind: str, count: int) -> None:
    until = time.monotonic() + 10
    while (found := (await refused(client))[kind]) < count:
        assert time.monotonic() < until, f"{found} {kind}, expected {count}"
        await asyncio.sleep(0.05)


def logged(run_dir: Path) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in (run_dir / "logs" / "ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "refused"]
