"""What the benchmarks of the ledger load it with: roles without engines, graders and weights, and a run directory."""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from common import wire
from common.config import Config
from common.layout import write_resolved
from common.rendezvous import RunKeys
from common.transport import Client
from common.versions import Version
from learner.ledger.store import Store
from tests.groups import completion, grade

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT_EVERY = 10
NUM_PROMPTS = 1000
WAIT_S = 60.0


class Lane:
    """One generator and its verifier: it takes leases and hands in groups of random tokens that are graded at once.

    Lanes of one client share a verifier, whose name is the client's own.

    Attributes:
        lease_s: What each lease took that was granted at once, in seconds.
        beat_s: What each beat took.
        published: The newest version, as far as it has heard.
    """

    def __init__(
        self, name: str, run: str, client: Client, config: Config, num_tokens: int, verifier: str = "verifier-0"
    ) -> None:
        rng = np.random.default_rng(0)
        self.verifier = verifier
        self._name, self._run, self._client = name, run, client
        self._completions = tuple(
            (
                rng.integers(0, 150_000, num_tokens, dtype=np.int32),
                -rng.exponential(size=num_tokens).astype(np.float32),
            )
            for _ in range(config.group_size)
        )
        self.lease_s: list[float] = []
        self.beat_s: list[float] = []
        self.published = Version(0, 0)
        self._holds: tuple[wire.LeaseKey, ...] = ()

    async def join(self) -> None:
        """Says hello."""
        await self._join(wire.Role.GENERATOR, self._name, "")

    async def join_verifier(self) -> None:
        """Says hello for the verifier."""
        await self._join(wire.Role.VERIFIER, self.verifier, "tcp://127.0.0.1:1")

    async def beat(self) -> None:
        """Beats, until cancelled."""
        while True:
            began = time.time()
            stats = wire.Stats(interval=wire.Span(began - 1, began), busy=(wire.Span(began - 1, began),), num_tokens=9)
            beat = wire.Beat(role=wire.Role.GENERATOR, name=self._name, holds=self._holds, stats=stats)
            answer = await self._client.ask(beat, wire.BeatAnswer, deadline_s=WAIT_S)
            assert answer.known
            self.beat_s.append(time.time() - began)
            await asyncio.sleep(answer.next_s)

    async def beat_verifier(self) -> None:
        """Beats for the verifier, until cancelled."""
        while True:
            beat = wire.Beat(role=wire.Role.VERIFIER, name=self.verifier)
            await asyncio.sleep((await self._client.ask(beat, wire.BeatAnswer, deadline_s=WAIT_S)).next_s)

    async def follow(self) -> None:
        """Hears of each change of the directory, until cancelled."""
        revision = 0
        while True:
            directory = await self._client.ask(wire.Watch(revision=revision), wire.Directory, deadline_s=WAIT_S)
            revision = directory.revision
            if directory.manifest is not None:
                self.published = directory.manifest.version

    async def work(self, publisher: "Lane | LoadLearner", room: int, sample_s: float = 0.0) -> None:
        """Turns leases into groups, until cancelled; each group takes `sample_s`."""
        while True:
            version, began = publisher.published, time.monotonic()
            request = wire.LeaseRequest(name=self._name, version=version, room=room)
            leases = (await self._client.ask(request, wire.Leases, deadline_s=WAIT_S)).leases
            if not leases:
                await asyncio.sleep(0.05)
                continue
            self.lease_s.append(time.monotonic() - began)
            self._holds = tuple(lease.key for lease in leases)
            if sample_s:
                await asyncio.sleep(sample_s)
            for lease in leases:
                scored = self.scored(lease.key, version)
                verdict = await self._client.ask(scored, wire.Verdict, deadline_s=WAIT_S)
                assert verdict.status == "stored", verdict
            self._holds = ()

    async def _join(self, role: wire.Role, name: str, endpoint: str) -> None:
        hello = wire.Hello(role=role, name=name, run=self._run, endpoint=endpoint)
        await self._client.ask(hello, wire.Welcome, deadline_s=WAIT_S)

    def scored(self, key: wire.LeaseKey, version: Version) -> wire.ScoredGroup:
        """A group of the lease, half of it right."""
        group = wire.Group(
            key=key,
            generator=self._name,
            prompt_id="train/p/1",
            answer="7",
            reward="math",
            completions=tuple(
                completion(tokens, logprobs, version, seed=i) for i, (tokens, logprobs) in enumerate(self._completions)
            ),
            seconds=1.0,
        )
        grades = tuple(grade(float(i % 2)) for i in range(len(self._completions)))
        return wire.ScoredGroup(group=group, grades=grades, verifier=self.verifier)


class LoadLearner:
    """A learner that trains nothing.

    Attributes:
        published: The newest version.
        num_trained: Groups so far.
    """

    def __init__(self, run: str, client: Client, config: Config) -> None:
        self._run, self._client, self._config = run, client, config
        self._fetching = asyncio.Semaphore(4)
        self.published, self.num_trained = Version(0, 0), 0

    async def begin(self) -> None:
        """Joins the run and publishes the starting weights."""
        hello = wire.Hello(role=wire.Role.LEARNER, name="learner-0", run=self._run)
        await self._client.ask(hello, wire.Welcome, deadline_s=WAIT_S)
        version = (await self._client.ask(wire.Begin(checkpoint=None), wire.Begun, deadline_s=WAIT_S)).version
        await self._publish(version)

    async def step(self) -> None:
        """One step, as soon as a batch is whole."""
        visits: tuple[int, ...] = ()
        while not visits:
            request = wire.Reserve(version=self.published, num_groups=self._config.groups_per_step)
            visits = (await self._client.ask(request, wire.Batch, deadline_s=WAIT_S)).visits
        await asyncio.gather(*map(self._fetch, visits))
        commit = wire.Commit(version=self.published, visits=visits)
        await self._client.ask(commit, wire.Committed, deadline_s=WAIT_S)
        self.num_trained += len(visits)
        version = self.published.next()
        await self._publish(version)
        if version.number % CHECKPOINT_EVERY == 0:
            await self._client.ask(wire.Checkpoint(version=version), wire.Done, deadline_s=WAIT_S)

    async def beat(self) -> None:
        """Beats, until cancelled."""
        while True:
            beat = wire.Beat(role=wire.Role.LEARNER, name="learner-0")
            await asyncio.sleep((await self._client.ask(beat, wire.BeatAnswer, deadline_s=WAIT_S)).next_s)

    async def status(self) -> wire.StatusReport:
        """How the run stands."""
        return await self._client.ask(wire.Status(), wire.StatusReport, deadline_s=WAIT_S)

    async def _fetch(self, visit: int) -> None:
        async with self._fetching:
            fetch = wire.Fetch(version=self.published, visit=visit)
            assert (await self._client.ask(fetch, wire.Fetched, deadline_s=WAIT_S)).group is not None

    async def _publish(self, version: Version) -> None:
        manifest = wire.Manifest(version=version, publishers=(), size_bytes=1, probe_token_ids=b"", probe_logprobs=b"")
        await self._client.ask(wire.Publish(manifest=manifest), wire.Done, deadline_s=WAIT_S)
        self.published = version


class LedgerProcess:
    """The real ledger of a run directory, on the first core; whoever starts it goes to the others."""

    def __init__(self, config: Config) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.run_dir = Path(self._directory.name)
        write_resolved(config, self.run_dir)
        self.run = RunKeys.create(self.run_dir).public
        write_prompts(self.run_dir)

    def __enter__(self) -> "LedgerProcess":
        command = [sys.executable, "-m", "learner.ledger", str(self.run_dir)]
        with (self.run_dir / "out").open("w") as out:
            self._child = subprocess.Popen(command, cwd=REPOSITORY, stdout=out, stderr=out)
        first, *others = self._cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(self._child.pid, {first})
        os.sched_setaffinity(0, others)
        self._process = psutil.Process(self._child.pid)
        return self

    def __exit__(self, *_: object) -> None:
        os.sched_setaffinity(0, self._cores)
        self._child.terminate()
        self._child.wait(WAIT_S)
        self._directory.cleanup()

    def cpu_s(self) -> float:
        """Processor time so far."""
        times = self._process.cpu_times()
        return times.user + times.system

    def memory_bytes(self) -> int:
        """Resident."""
        return self._process.memory_info().rss


def write_prompts(run_dir: Path) -> None:
    """Prompts of 200 tokens, as if they had been read from a file."""
    store = Store(run_dir)
    with store.transaction() as sql:
        sql.execute("INSERT INTO files VALUES (0, 'train', 'p', 'p', '', 1.0, ?)", (NUM_PROMPTS,))
        for row in range(NUM_PROMPTS):
            prompt = wire.Prompt(
                id=f"train/p/{row}",
                source="p",
                token_ids=wire.int_bytes(np.arange(200, dtype=np.int32)),
                answer="7",
                reward="math",
            )
            sql.execute("INSERT INTO prompts VALUES (?, 0, ?, ?, '', ?)", (row, row, wire.encode(prompt), b""))
        sql.execute("INSERT INTO meta VALUES ('prepared', x'00')")
    store.close()


@contextmanager
def busy_learner() -> Generator[None]:
    """A process that multiplies matrices all the time, on all cores but the first."""
    process = multiprocessing.get_context("spawn").Process(target=_multiply)
    process.start()
    assert process.pid is not None
    os.sched_setaffinity(process.pid, set(sorted(os.sched_getaffinity(0))[1:]))
    try:
        yield
    finally:
        process.kill()
        process.join()


def _multiply() -> None:
    import torch

    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)
    while True:
        torch.mm(matrix, matrix)
