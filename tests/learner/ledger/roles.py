"""The real ledger as a process, and the roles that speak to it, driven by hand."""

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from common import transport, wire
from common.config import Config
from common.rendezvous import Rendezvous, RunKeys
from common.transport import Client, Service, ledger_client
from common.versions import Version
from learner.ledger.keeper import TICK_S
from learner.ledger.service import LedgerService
from learner.ledger.store import Store
from tests.clocks import PATIENCE_S, pass_time, wait_until

ROOT = Path(__file__).parents[3]
MakeRun = Callable[..., tuple[Path, Config]]
MakeGroup = Callable[..., wire.ScoredGroup]


def command(run_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs the ledger's command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "learner.ledger", str(run_dir), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


class LedgerProcess:
    """The real ledger, which can be killed and started again."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "learner.ledger", str(self._run_dir)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def restart(self) -> None:
        """Kills it and starts the next, which listens elsewhere."""
        before = Rendezvous.read(self._run_dir).incarnation
        self.stop(signal.SIGKILL)
        self.start()
        wait_until(lambda: Rendezvous.read(self._run_dir).incarnation > before, "the next ledger")

    def stop(self, number: int) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(PATIENCE_S)


async def restart(process: LedgerProcess, client: Client) -> None:
    """Kills the ledger and starts the next, which the client finds; it looks soon, and as often as it takes."""
    process.restart()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "SILENCE_S", 0.5)
        await has_come(client)


@asynccontextmanager
async def serving(run_dir: Path) -> AsyncGenerator[tuple[LedgerProcess, Client]]:
    """A ledger that was prepared and started, and a client of it."""
    prepared = command(run_dir, "--prepare")
    assert prepared.returncode == 0, prepared.stderr
    process = LedgerProcess(run_dir)
    process.start()
    try:
        async with ledger_client(run_dir) as client:
            yield process, client
    finally:
        process.stop(signal.SIGKILL)


@asynccontextmanager
async def serving_by_hand(run_dir: Path, config: Config) -> AsyncGenerator[Client]:
    """A client of a ledger in this process, in a loop whose time only the test moves."""
    prepared = await asyncio.to_thread(command, run_dir, "--prepare")
    assert prepared.returncode == 0, prepared.stderr
    keys, store = RunKeys.load(run_dir), Store(run_dir)
    clock = asyncio.get_running_loop().time
    incarnation = store.identify(keys.public)
    ledger = LedgerService(
        store,
        config,
        run=keys.public,
        incarnation=incarnation,
        refused=lambda: service.refusals.counts,
        clock=clock,
    )
    async with (
        Service(ledger.handle, keys=keys) as service,
        Client(lambda: service.endpoint, keys=keys, name="ledger") as client,
    ):
        parts = (service.serve(), ledger.keeper.keep_time(), ledger.keeper.keep_log_short(), ledger.leases.work())
        working = [asyncio.create_task(part) for part in parts]
        try:
            yield client
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
            store.close()


async def let_ticks_pass(seconds: float) -> None:
    """Moves the time as a ledger hears it that never stands still."""
    for _ in range(round(seconds / TICK_S)):
        await pass_time(TICK_S)


async def has_come(client: Client) -> None:
    """Returns when the ledger has taken up all that the client asked before: one answers what is asked in order."""
    await asyncio.sleep(0)  # a task that asks has begun
    await client.ask(wire.Status(), wire.StatusReport, deadline_s=PATIENCE_S)


class Fleet:
    """A generator and its verifier, driven by hand."""

    def __init__(self, run_dir: Path, client: Client, make_group: MakeGroup, name: str = "generator-0") -> None:
        self._name = name
        self._run, self._client, self._make = RunKeys.load(run_dir).public, client, make_group
        self.stored: Counter[int] = Counter()
        self.evaluated: Counter[int] = Counter()
        self.seeds: set[int] = set()

    async def join(self) -> None:
        for role, name in ((wire.Role.GENERATOR, self._name), (wire.Role.VERIFIER, "verifier-0")):
            endpoint = "tcp://127.0.0.1:1" if role is wire.Role.VERIFIER else ""
            hello = wire.Hello(role=role, name=name, run=self._run, endpoint=endpoint)
            await self._client.ask(hello, wire.Welcome, deadline_s=PATIENCE_S)

    async def work(self, version: Version, room: int) -> int:
        """Takes what it gets for `room` groups and hands it in twice; returns how many training groups it got."""
        request = wire.LeaseRequest(name=self._name, version=version, room=room)
        leases = (await self._client.ask(request, wire.Leases, deadline_s=PATIENCE_S)).leases
        for lease in leases:
            assert lease.num_completions == (1 if lease.key.is_evaluation else 2)
            group = self._make(lease.key, version, (1.0, 0.0)[: lease.num_completions])
            first = await self._client.ask(group, wire.Verdict, deadline_s=PATIENCE_S)
            again = await self._client.ask(group, wire.Verdict, deadline_s=PATIENCE_S)
            assert (first.status, again.status) == ("stored", "duplicate")
            (self.evaluated if lease.key.is_evaluation else self.stored)[lease.key.visit] += 1
            self.seeds.add(lease.seed)
        return sum(not lease.key.is_evaluation for lease in leases)

    async def published(self) -> Version | None:
        directory = await self._client.ask(wire.Watch(revision=0), wire.Directory, deadline_s=PATIENCE_S)
        assert directory.verifiers == ("tcp://127.0.0.1:1",)
        return directory.manifest.version if directory.manifest else None


class Reserved(NamedTuple):
    """The groups of a step, or what the ledger waits for."""

    groups: tuple[wire.TrainingGroup, ...]
    waiting_for: str


class Learner:
    """A learner without weights."""

    def __init__(self, client: Client, config: Config) -> None:
        self._client, self._config = client, config
        self.trained: list[int] = []
        self.version, self.sequence = Version(0, 0), 0

    async def hello(self) -> None:
        assert self._client._keys is not None
        hello = wire.Hello(role=wire.Role.LEARNER, name="learner-0", run=self._client._keys.public)
        await self._client.ask(hello, wire.Welcome, deadline_s=PATIENCE_S)

    async def begin(self, checkpoint: Version | None = None) -> None:
        await self.hello()
        request = wire.Begin(checkpoint=checkpoint, sequence=self.sequence if checkpoint else 0)
        begun = await self._client.ask(request, wire.Begun, deadline_s=PATIENCE_S)
        self.version = begun.version
        await self.publish()

    async def publish(self) -> None:
        manifest = wire.Manifest(
            version=self.version, publishers=(), size_bytes=1, probe_token_ids=b"", probe_logprobs=b""
        )
        await self._client.ask(wire.Publish(manifest=manifest), wire.Done, deadline_s=PATIENCE_S)

    async def reserve(self) -> Reserved:
        """A batch with its groups; none where it is not whole, or where one of them is lost."""
        request = wire.Reserve(version=self.version, num_groups=self._config.groups_per_step)
        batch = await self._client.ask(request, wire.Batch, deadline_s=PATIENCE_S)
        groups: list[wire.TrainingGroup] = []
        for visit in batch.visits:
            fetch = wire.Fetch(version=self.version, visit=visit)
            if (group := (await self._client.ask(fetch, wire.Fetched, deadline_s=PATIENCE_S)).group) is None:
                return Reserved((), batch.waiting_for)
            groups.append(group)
        return Reserved(tuple(groups), batch.waiting_for)

    async def commit(self, batch: Reserved) -> None:
        visits = tuple(g.scored.group.key.visit for g in batch.groups)
        for _ in range(2):
            request = wire.Commit(version=self.version, visits=visits)
            self.sequence = (await self._client.ask(request, wire.Committed, deadline_s=PATIENCE_S)).sequence
        self.trained += visits
        self.version = self.version.next()
        await self.publish()
