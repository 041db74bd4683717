"""The verifier as a process, between a generator and a ledger that the test plays over ZeroMQ."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil
import pytest

from common import wire
from common.errors import RefusedError
from common.rendezvous import Rendezvous, RunKeys
from common.transport import Client, Service
from tests.clocks import PATIENCE_S, comes_about
from tests.leaks import living

STATUS = wire.Status()
A = TypeVar("A", bound=wire.Message)
MakeRun = Callable[..., Path]
MakeGroup = Callable[..., wire.Group]


class Ledger:
    """Answers as the ledger does, and remembers what it was told.

    Attributes:
        endpoint: Of the verifier that said hello.
        scored: What it was sent.
        beats: What the verifier's beats reported.
        storing: Verdicts are held while it is not set.
    """

    def __init__(self, verdict: wire.Answer) -> None:
        self._verdict = verdict
        self.endpoint: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.scored: list[wire.ScoredGroup] = []
        self.beats: list[wire.Beat] = []
        self.storing = asyncio.Event()
        self.storing.set()

    def stats(self) -> list[wire.Stats]:
        """What its beats told."""
        return [beat.stats for beat in self.beats if beat.stats is not None]

    async def handle(self, _: bytes, request: wire.Request) -> wire.Answer:
        match request:
            case wire.Hello():
                if not self.endpoint.done():
                    self.endpoint.set_result(request.endpoint)
                return wire.Welcome(incarnation=1)
            case wire.Beat():
                self.beats.append(request)
                return wire.BeatAnswer(cancelled=(), known=True)
            case wire.ScoredGroup():
                self.scored.append(request)
                await self.storing.wait()
                return self._verdict
            case _:
                return wire.Refused(reason="unexpected")


def _start(run_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "verifier", str(run_dir), "verifier-0"], stderr=subprocess.PIPE, text=True
    )


@asynccontextmanager
async def _running(
    run_dir: Path, verdict: wire.Answer | None = None
) -> AsyncIterator[tuple[subprocess.Popen[str], Ledger, Client]]:
    keys = RunKeys.load(run_dir)
    ledger = Ledger(verdict or wire.Verdict(status="stored"))
    service = Service(ledger.handle, keys=keys)
    async with service, asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(service.serve())
        Rendezvous(address=service.endpoint, public_key=keys.public, incarnation=1).write(run_dir)
        process = _start(run_dir)
        try:
            endpoint = await ledger.endpoint
            async with Client(lambda: endpoint, keys=keys, name="verifier") as client:
                yield process, ledger, client
        finally:
            process.kill()
            process.communicate()
            serving.cancel()


async def _ask(client: Client, request: wire.Request, expect: type[A]) -> A:
    return await client.ask_once(request, expect, silence_s=PATIENCE_S)


def test_a_group_is_decoded_graded_and_the_ledgers_verdict_relayed(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir = make_run()

    async def body() -> None:
        async with _running(run_dir, wire.Verdict(status="duplicate", reason="seen")) as (_, ledger, client):
            assert await _ask(client, wire.RoomRequest(num_groups=1), wire.Room) == wire.Room(num_groups=1)
            group = make_group("so \\boxed{42}", "41", "I do not know. " * 20)
            assert await _ask(client, group, wire.Verdict) == wire.Verdict(status="duplicate", reason="seen")
            (scored,) = ledger.scored
            assert scored.group == group
            assert scored.verifier == "verifier-0"
            assert [grade.outcome for grade in scored.grades] == ["correct", "wrong", "unparsable"]
            assert [grade.extracted for grade in scored.grades] == ["42", "41", ""]
            await comes_about(lambda: sum(s.num_items for s in ledger.stats()) == 3, "three grades to be told")
            assert (
                ledger.stats()[-1].gauges.items()
                >= {"num_timeout": 0, "num_error": 0, "num_workers_replaced": 0}.items()
            )

    asyncio.run(body())


def test_a_group_that_is_sent_again_while_it_is_in_work_is_graded_once(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    run_dir = make_run(max_groups=1)

    async def body() -> None:
        async with _running(run_dir) as (_, ledger, client):
            ledger.storing.clear()
            asking = [asyncio.create_task(_ask(client, make_group("42"), wire.Verdict)) for _ in range(3)]
            await comes_about(lambda: len(ledger.scored) == 1, "a graded group")
            with pytest.raises(RefusedError, match="expected a request to a verifier"):  # it came after the three
                await _ask(client, STATUS, wire.Verdict)
            ledger.storing.set()
            assert await asyncio.gather(*asking) == [wire.Verdict(status="stored")] * 3
            assert len(ledger.scored) == 1
            await _ask(client, make_group("42"), wire.Verdict)
            assert len(ledger.scored) == 2

    asyncio.run(body())


def test_a_verifier_without_room_says_so_and_takes_no_group(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir = make_run(max_groups=2)

    async def body() -> None:
        async with _running(run_dir) as (_, ledger, client):
            ledger.storing.clear()
            assert await _ask(client, wire.RoomRequest(num_groups=5), wire.Room) == wire.Room(num_groups=2)
            held = [asyncio.create_task(_ask(client, make_group("1", visit=v), wire.Verdict)) for v in (1, 2)]
            await comes_about(lambda: len(ledger.scored) == 2, "two graded groups")
            third = asyncio.create_task(_ask(client, make_group("1", visit=3), wire.Verdict))
            assert await _ask(client, wire.RoomRequest(num_groups=1), wire.Room) == wire.Room(num_groups=0)
            with pytest.raises(RefusedError, match="no room"):
                await third
            ledger.storing.set()
            await asyncio.gather(*held)
            assert await _ask(client, wire.RoomRequest(num_groups=5), wire.Room) == wire.Room(num_groups=2)

    asyncio.run(body())


def test_the_ledgers_refusal_is_relayed_and_harms_nobody(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir = make_run()

    async def body() -> None:
        async with _running(run_dir, wire.Refused(reason="another run")) as (process, _, client):
            with pytest.raises(RefusedError, match="another run"):
                await _ask(client, make_group("42"), wire.Verdict)
            with pytest.raises(RefusedError, match="expected a request to a verifier"):
                await _ask(client, STATUS, wire.Verdict)
            assert process.poll() is None

    asyncio.run(body())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_verifier(make_run: MakeRun, make_group: MakeGroup, number: int) -> None:
    run_dir = make_run(num_workers=2)

    async def body() -> None:
        async with _running(run_dir) as (process, ledger, client):
            ledger.storing.clear()
            asking = asyncio.create_task(_ask(client, make_group("42"), wire.Verdict))
            await comes_about(lambda: len(ledger.scored) == 1, "a graded group")
            workers = psutil.Process(process.pid).children(recursive=True)
            assert len(workers) == 2
            os.kill(process.pid, number)
            await comes_about(lambda: process.poll() is not None, "the verifier to end")
            assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0)
            await comes_about(lambda: not living(workers), "its workers to end")
            asking.cancel()

    asyncio.run(body())


def test_a_verifier_whose_ledger_does_not_answer_can_be_stopped(make_run: MakeRun) -> None:
    run_dir = make_run()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.settimeout(PATIENCE_S)
        address = f"tcp://127.0.0.1:{deaf.getsockname()[1]}"
        Rendezvous(address=address, public_key=RunKeys.load(run_dir).public, incarnation=1).write(run_dir)
        process = _start(run_dir)
        try:
            with deaf.accept()[0] as connection:
                assert connection.recv(1), "it says hello"
                assert process.poll() is None
                process.terminate()
                assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            process.communicate()


def test_a_model_without_tokenizer_is_one_line_and_exit_code_2(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir = make_run()
    (tmp_path / "model" / "tokenizer.json").unlink()
    process = _start(run_dir)
    _, message = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert (
        message == f"sluice: {tmp_path / 'model' / 'tokenizer.json'}: not found, expected the model's fast tokenizer\n"
    )


def test_failures_are_counted_and_logged_but_are_no_reward(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir = make_run()

    async def body() -> None:
        async with _running(run_dir) as (_, ledger, client):
            await _ask(client, make_group("42", "41", reward="unknown"), wire.Verdict)
            assert [grade.outcome for grade in ledger.scored[0].grades] == ["error", "error"]
            await comes_about(lambda: ledger.stats()[-1].gauges.get("num_error") == 2, "two errors to be told")

    asyncio.run(body())
    events = [json.loads(line) for line in (run_dir / "logs" / "verifier-0.jsonl").read_text().splitlines()]
    (warning,) = [event for event in events if event["event"] == "grading_failed"]
    assert warning["level"] == "warning"
    assert (warning["visit"], warning["prompt"], warning["num_error"]) == (1, "train:1", 2)


def test_an_answer_that_the_length_limit_cut_is_wrong(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir = make_run()

    async def body() -> None:
        async with _running(run_dir, wire.Verdict(status="stored")) as (_, ledger, client):
            whole = make_group("42", "42")
            cut = msgspec.structs.replace(whole.completions[1], finish_reason=wire.FinishReason.LENGTH)
            group = msgspec.structs.replace(whole, completions=(whole.completions[0], cut))
            await _ask(client, group, wire.Verdict)
            (scored,) = ledger.scored
            assert [grade.outcome for grade in scored.grades] == ["correct", "wrong"]
            assert [grade.reward for grade in scored.grades] == [1.0, 0.0]

    asyncio.run(body())
