"""The ledger on one core beside a busy learner: groups through their whole life, the wait for a lease, a large fleet.

The load generator plays generators, verifiers and the learner; it shares the other core with a process that multiplies
matrices all the time. What it does not do: sample, grade or train.
"""

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
from common.learning import LearnerConfig, LossConfig
from common.rendezvous import RunKeys
from common.transport import Client, ledger_client
from common.versions import Version
from learner.ledger.store import Store
from tests.bench.report import Figure
from tests.groups import completion, grade

REPOSITORY = Path(__file__).resolve().parents[2]
GROUP_SIZE, TOKENS = 16, 1000
NUM_GROUPS = 4000
NUM_PROMPTS = 1000
CHECKPOINT_EVERY = 10
LANES = 24
CONFIG = Config(
    group_size=GROUP_SIZE,
    groups_per_step=64,
    updates_per_step=4,
    max_staleness=4,
    learner=LearnerConfig(checkpoint_every=CHECKPOINT_EVERY),
    loss=LossConfig(filter_uniform=False),
)


def run() -> list[Figure]:
    """Measures the ledger."""
    with _busy_learner(), _ledger(CONFIG) as run_dir:
        rate, cpu = asyncio.run(_whole_lives(run_dir))
    return [
        Figure("groups of 16 x 1,000 tokens through their whole life", rate, "groups/s", "target 500"),
        Figure("the ledger's own processor time, a group", cpu * 1e3, "ms"),
    ]


async def _whole_lives(run_dir: Path) -> tuple[float, float]:
    """Groups a second from lease to trained, and the ledger's processor seconds a group."""
    process = _process(run_dir)
    async with ledger_client(run_dir) as client, ledger_client(run_dir) as learners:
        load = Load(run_dir, client)
        learner = LoadLearner(learners)
        await load.join()
        await learner.begin()
        lanes = [asyncio.create_task(load.lane(learner)) for _ in range(LANES)]
        for _ in range(3):
            await learner.step()
        began, before, trained = time.monotonic(), _cpu_s(process), learner.num_trained
        while learner.num_trained - trained < NUM_GROUPS:
            await learner.step()
        seconds, cpu, num = time.monotonic() - began, _cpu_s(process) - before, learner.num_trained - trained
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
    return num / seconds, cpu / num


class Load:
    """Generators and verifiers without engines and graders."""

    def __init__(self, run_dir: Path, client: Client) -> None:
        rng = np.random.default_rng(0)
        self._run, self._client = RunKeys.load(run_dir).public, client
        self._tokens = rng.integers(0, 150_000, (GROUP_SIZE, TOKENS), dtype=np.int32)
        self._logprobs = -rng.exponential(size=(GROUP_SIZE, TOKENS)).astype(np.float32)

    async def join(self) -> None:
        for role, name in ((wire.Role.GENERATOR, "generator-0"), (wire.Role.VERIFIER, "verifier-0")):
            endpoint = "tcp://127.0.0.1:1" if role is wire.Role.VERIFIER else ""
            hello = wire.Hello(role=role, name=name, run=self._run, endpoint=endpoint)
            await self._client.ask(hello, wire.Welcome, deadline_s=30)
        self._beats = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            for role, name in ((wire.Role.GENERATOR, "generator-0"), (wire.Role.VERIFIER, "verifier-0")):
                await self._client.ask(wire.Beat(role=role, name=name), wire.BeatAnswer, deadline_s=30)
            await asyncio.sleep(1)

    async def lane(self, learner: "LoadLearner") -> None:
        while True:
            version = learner.version
            request = wire.LeaseRequest(name="generator-0", version=version, room=2)
            for lease in (await self._client.ask(request, wire.Leases, deadline_s=60)).leases:
                verdict = await self._client.ask(self.scored(lease.key, version), wire.Verdict, deadline_s=60)
                assert verdict.status == "stored", verdict

    def scored(self, key: wire.LeaseKey, version: Version) -> wire.ScoredGroup:
        completions = tuple(
            completion(tokens, logprobs, version, seed=i)
            for i, (tokens, logprobs) in enumerate(zip(self._tokens, self._logprobs, strict=True))
        )
        group = wire.Group(
            key=key,
            generator="generator-0",
            prompt_id="train/p/1",
            answer="7",
            reward="math",
            completions=completions,
            seconds=1.0,
        )
        grades = tuple(grade(float(i % 2)) for i in range(GROUP_SIZE))
        return wire.ScoredGroup(group=group, grades=grades, verifier="verifier-0")


class LoadLearner:
    """A learner that trains nothing."""

    def __init__(self, client: Client) -> None:
        self._client, self._fetching = client, asyncio.Semaphore(4)
        self.version, self.num_trained = Version(0, 0), 0

    async def begin(self) -> None:
        self.version = (await self._client.ask(wire.Begin(checkpoint=None), wire.Begun, deadline_s=30)).version
        await self._publish()

    async def step(self) -> None:
        visits: tuple[int, ...] = ()
        while not visits:
            request = wire.Reserve(version=self.version, num_groups=CONFIG.groups_per_step)
            visits = (await self._client.ask(request, wire.Batch, deadline_s=60)).visits
        await asyncio.gather(*map(self._fetch, visits))
        await self._client.ask(wire.Commit(version=self.version, visits=visits), wire.Committed, deadline_s=60)
        self.version, self.num_trained = self.version.next(), self.num_trained + len(visits)
        await self._publish()
        if self.version.number % CHECKPOINT_EVERY == 0:
            await self._client.ask(wire.Checkpoint(version=self.version), wire.Done, deadline_s=60)

    async def _fetch(self, visit: int) -> None:
        async with self._fetching:
            fetch = wire.Fetch(version=self.version, visit=visit)
            fetched = await self._client.ask(fetch, wire.Fetched, deadline_s=60)
            assert fetched.group is not None

    async def _publish(self) -> None:
        manifest = wire.Manifest(
            version=self.version, path="/nowhere", size_bytes=1, probe_token_ids=b"", probe_logprobs=b""
        )
        await self._client.ask(wire.Publish(manifest=manifest), wire.Done, deadline_s=30)


@contextmanager
def _ledger(config: Config) -> Generator[Path]:
    """The real ledger, on the first core; this process on the others."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory)
        write_resolved(config, run_dir)
        RunKeys.create(run_dir)
        write_prompts(run_dir)
        command = [sys.executable, "-m", "learner.ledger", str(run_dir)]
        with (run_dir / "out").open("w") as out:
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=out, stderr=out)
        (run_dir / "pid").write_text(str(process.pid))
        first, *others = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(process.pid, {first})
        os.sched_setaffinity(0, others)
        try:
            yield run_dir
        finally:
            os.sched_setaffinity(0, {first, *others})
            process.terminate()
            process.wait(30)


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
def _busy_learner() -> Generator[None]:
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


def _process(run_dir: Path) -> psutil.Process:
    return psutil.Process(int((run_dir / "pid").read_text()))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
