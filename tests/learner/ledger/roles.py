"""The real ledger as a process, and the roles that speak to it, driven by hand."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from common import wire
from common.config import Config
from common.rendezvous import RunKeys
from common.transport import Client, ledger_client
from common.versions import Version

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
        timeout=60,
        check=False,
    )


class LedgerProcess:
    """The real ledger, which can be killed and started again."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "learner.ledger", str(self._run_dir)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def stop(self, number: int) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(timeout=20)


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
            await self._client.ask(hello, wire.Welcome, deadline_s=30)

    async def work(self, version: Version, room: int) -> int:
        """Takes what it gets for `room` groups and hands it in twice; returns how many training groups it got."""
        request = wire.LeaseRequest(name=self._name, version=version, room=room)
        leases = (await self._client.ask(request, wire.Leases, deadline_s=30)).leases
        for lease in leases:
            assert lease.num_completions == (1 if lease.key.is_evaluation else 2)
            group = self._make(lease.key, version, (1.0, 0.0)[: lease.num_completions])
            first = await self._client.ask(group, wire.Verdict, deadline_s=30)
            again = await self._client.ask(group, wire.Verdict, deadline_s=30)
            assert (first.status, again.status) == ("stored", "duplicate")
            (self.evaluated if lease.key.is_evaluation else self.stored)[lease.key.visit] += 1
            self.seeds.add(lease.seed)
        return sum(not lease.key.is_evaluation for lease in leases)

    async def published(self) -> Version | None:
        directory = await self._client.ask(wire.Watch(revision=0), wire.Directory, deadline_s=30)
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
        await self._client.ask(hello, wire.Welcome, deadline_s=30)

    async def begin(self, checkpoint: Version | None = None) -> None:
        await self.hello()
        request = wire.Begin(checkpoint=checkpoint, sequence=self.sequence if checkpoint else 0)
        begun = await self._client.ask(request, wire.Begun, deadline_s=30)
        self.version = begun.version
        await self.publish()

    async def publish(self) -> None:
        manifest = wire.Manifest(
            version=self.version, path="/nowhere", size_bytes=1, probe_token_ids=b"", probe_logprobs=b""
        )
        await self._client.ask(wire.Publish(manifest=manifest), wire.Done, deadline_s=30)

    async def reserve(self) -> Reserved:
        """A batch with its groups; none where it is not whole, or where one of them is lost."""
        request = wire.Reserve(version=self.version, num_groups=self._config.groups_per_step)
        batch = await self._client.ask(request, wire.Batch, deadline_s=30)
        groups: list[wire.TrainingGroup] = []
        for visit in batch.visits:
            fetch = wire.Fetch(version=self.version, visit=visit)
            if (group := (await self._client.ask(fetch, wire.Fetched, deadline_s=30)).group) is None:
                return Reserved((), batch.waiting_for)
            groups.append(group)
        return Reserved(tuple(groups), batch.waiting_for)

    async def commit(self, batch: Reserved) -> None:
        visits = tuple(g.scored.group.key.visit for g in batch.groups)
        for _ in range(2):
            request = wire.Commit(version=self.version, visits=visits)
            self.sequence = (await self._client.ask(request, wire.Committed, deadline_s=30)).sequence
        self.trained += visits
        self.version = self.version.next()
        await self.publish()
