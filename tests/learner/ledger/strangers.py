"""A peer that sends what it likes to the real ledger, and one beside it that has to be served."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

import zmq.asyncio

from common import wire
from common.rendezvous import Rendezvous, RunKeys
from common.transport import Client
from tests.clocks import PATIENCE_S

STATUS = wire.Status()


class Attacker:
    """A DEALER that sends what it likes. Use as a context manager."""

    def __init__(self, run_dir: Path, keys: RunKeys | None, server: str = "", *, address: str = "") -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        if keys is not None:
            self._socket.curve_publickey, self._socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
            self._socket.curve_serverkey = (server or RunKeys.load(run_dir).public).encode()
        self._ended = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(address or Rendezvous.read(run_dir).address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    async def send(self, *frames: bytes) -> None:
        await self._socket.send_multipart(frames)

    async def ask(self, data: bytes) -> wire.Message:
        """The answer, which comes after all that was sent before has been taken up."""
        await self.send(b"question", data)
        while (answer := await self._socket.recv_multipart())[0] != b"question":
            pass
        return wire.decode(answer[1])

    async def connection_ended(self) -> None:
        """Waits until the other side has ended the connection once more."""
        async with asyncio.timeout(PATIENCE_S):
            await self._ended.recv_multipart()


@asynccontextmanager
async def strait(run_dir: Path, max_bytes: int) -> AsyncGenerator[str]:
    """The address of a way to the ledger that lets only the first bytes of a connection through, and all that is back.

    A connection ends when the ledger ends it.
    """
    host, port = Rendezvous.read(run_dir).address.removeprefix("tcp://").split(":")
    ends: list[asyncio.StreamWriter] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_ledger, to_ledger = await asyncio.open_connection(host, int(port))
        ends.extend((to_ledger, writer))
        try:
            async with asyncio.TaskGroup() as ways:
                ways.create_task(_pass_on(reader, to_ledger, max_bytes))
                await _pass_on(from_ledger, writer, 1 << 60)
        finally:
            to_ledger.close()
            writer.close()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for end in ends:
            end.close()


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, num_bytes: int) -> None:
    with suppress(ConnectionError):  # a side that ends with bytes unread resets the connection
        while num_bytes and (data := await source.read(min(num_bytes, 1 << 16))):
            target.write(data)
            num_bytes -= len(data)


@asynccontextmanager
async def undisturbed(client: Client) -> AsyncGenerator[None]:
    """A healthy peer on the same socket is answered all the while."""

    async def ask() -> None:
        while not done.is_set():
            await client.ask_once(STATUS, wire.StatusReport, silence_s=PATIENCE_S)
            answered.set()
            await asyncio.sleep(0.01)

    done, answered = asyncio.Event(), asyncio.Event()
    asking = asyncio.create_task(ask())
    try:
        yield
        answered.clear()
        again = asyncio.create_task(answered.wait())
        await asyncio.wait({asking, again}, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
    finally:
        done.set()
        await asking


async def refused(client: Client) -> dict[str, int]:
    return (await client.ask(STATUS, wire.StatusReport, deadline_s=PATIENCE_S)).refused


async def wait_for(client: Client, kind: str, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await refused(client))[kind] < count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def logged(run_dir: Path) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in (run_dir / "logs" / "ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "refused"]
