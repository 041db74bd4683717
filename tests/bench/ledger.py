"""The ledger on one core beside a busy learner: groups through their whole life, leases, a large fleet, memory.

The load generator plays generators, verifiers and the learner, and samples, grades and trains nothing. It shares the
other cores with a process that multiplies matrices all the time.
"""

import asyncio
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil

from common import wire
from common.config import Config
from common.learning import LearnerConfig, LossConfig
from common.transport import Client, ledger_client
from learner.ledger.store import Store
from tests.bench.ledger_load import (
    CHECKPOINT_EVERY,
    Lane,
    LedgerProcess,
    LoadLearner,
    busy_learner,
    write_prompts,
)
from tests.bench.report import Figure

NUM_LANES, NUM_GROUPS = 24, 4000
PACED_S, PACED_GROUPS_PER_S = 20.0, 100
NUM_GENERATORS, NUM_CONNECTIONS, FLEET_S, SAMPLE_S = 10_000, 50, 60.0, 90.0
MANY_GROUPS = 1_000_000
LEARNER = LearnerConfig(checkpoint_every=CHECKPOINT_EVERY)
UNFILTERED = LossConfig(filter_uniform=False)
LIFE = Config(group_size=16, groups_per_step=64, updates_per_step=4, max_staleness=4, learner=LEARNER, loss=UNFILTERED)
FLEET = Config(
    group_size=2, groups_per_step=2048, updates_per_step=1, max_staleness=8, learner=LEARNER, loss=UNFILTERED
)
MANY = Config(group_size=2, groups_per_step=64, updates_per_step=1, max_staleness=4, learner=LEARNER, loss=UNFILTERED)


def run() -> list[Figure]:
    """Measures the ledger."""
    with busy_learner():
        whole, paced = asyncio.run(_whole_lives()), asyncio.run(_paced())
    fleet = asyncio.run(_fleet())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        return [*whole, *paced, *fleet, *apart.submit(_many_groups).result()]


async def _whole_lives() -> list[Figure]:
    """As fast as it goes: leased, sent, stored, served to the learner, trained and freed."""
    with LedgerProcess(LIFE) as ledger:
        async with ledger_client(ledger.run_dir) as client, ledger_client(ledger.run_dir) as learners:
            learner = LoadLearner(ledger.run, learners, LIFE)
            lanes = [Lane(f"generator-{i}", ledger.run, client, LIFE, 1000) for i in range(NUM_LANES)]
            async with _fleet_of(lanes, learner) as tasks:
                tasks += [asyncio.create_task(lane.work(learner, room=2)) for lane in lanes]
                for _ in range(3):
                    await learner.step()
                began, before, trained = time.monotonic(), ledger.cpu_s(), learner.num_trained
                while learner.num_trained - trained < NUM_GROUPS:
                    await learner.step()
                seconds, cpu_s, num = time.monotonic() - began, ledger.cpu_s() - before, learner.num_trained - trained
    return [
        Figure("groups of 16 x 1,000 tokens, leased to freed", num / seconds, "groups/s", "target 500"),
        Figure("processor time of the ledger, a group", cpu_s / num * 1e3, "ms"),
    ]


async def _paced() -> list[Figure]:
    """The wait of a generator for a lease while others' groups come, batches go and steps are committed steadily."""
    with LedgerProcess(LIFE) as ledger:
        async with ledger_client(ledger.run_dir) as client, ledger_client(ledger.run_dir) as learners:
            learner = LoadLearner(ledger.run, learners, LIFE)
            lanes = [Lane(f"generator-{i}", ledger.run, client, LIFE, 1000) for i in range(PACED_GROUPS_PER_S // 2)]
            async with _fleet_of(lanes, learner) as tasks:
                tasks += [asyncio.create_task(lane.work(learner, room=1, sample_s=0.5)) for lane in lanes]
                tasks.append(asyncio.create_task(_forever(learner)))
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
                    waits = await asyncio.get_running_loop().run_in_executor(apart, _probe, ledger.run_dir, ledger.run)
            rate = learner.num_trained / PACED_S
    return [
        Figure(f"lease, 99th percentile of {len(waits)}, at {rate:.0f} groups/s", _p99_ms(waits), "ms", "target 10"),
        Figure("lease, median", float(np.median(waits)) * 1e3, "ms"),
    ]


def _probe(run_dir: Path, run: str) -> list[float]:
    """Seconds of each lease of one more generator, in a process that is to wait for nothing but the ledger."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)

    async def probe() -> list[float]:
        async with ledger_client(run_dir) as client:
            lane = Lane("probe", run, client, LIFE, 1, "verifier-probe")
            await lane.join_verifier()
            await lane.join()
            working = [asyncio.create_task(part) for part in _parts(lane)]
            await asyncio.sleep(PACED_S)
            for task in working:
                assert not task.done(), str(task)
                task.cancel()
            return lane.lease_s

    return asyncio.run(probe())


def _parts(lane: Lane) -> tuple[Coroutine[Any, Any, None], ...]:
    return lane.beat(), lane.beat_verifier(), lane.follow(), lane.work(lane, room=1, sample_s=0.01)


async def _fleet() -> list[Figure]:
    """Ten thousand generators that each sample a group for a minute and a half, over fifty connections."""
    async with contextlib.AsyncExitStack() as stack:
        ledger = stack.enter_context(LedgerProcess(FLEET))
        clients = [await stack.enter_async_context(ledger_client(ledger.run_dir)) for _ in range(NUM_CONNECTIONS + 1)]
        learner = LoadLearner(ledger.run, clients[-1], FLEET)
        lanes = [_lane_of_a_fleet(i, ledger.run, clients) for i in range(NUM_GENERATORS)]
        tasks = await stack.enter_async_context(_fleet_of(lanes, learner))
        for lane in lanes:
            tasks += [asyncio.create_task(lane.follow()), asyncio.create_task(lane.work(learner, 1, SAMPLE_S))]
            await asyncio.sleep(SAMPLE_S / NUM_GENERATORS)  # else all of them end at the same moment
        tasks.append(asyncio.create_task(_forever(learner)))
        for lane in lanes:
            lane.lease_s.clear()
            lane.beat_s.clear()
        began, before, trained = time.monotonic(), ledger.cpu_s(), learner.num_trained
        await asyncio.sleep(FLEET_S)
        seconds, cpu_s, num = time.monotonic() - began, ledger.cpu_s() - before, learner.num_trained - trained
        report = await learner.status()
        memory_bytes = ledger.memory_bytes()
    num_alive = sum(member.role is wire.Role.GENERATOR for member in report.members)
    num_lapsed = report.accounts["waiting"] + report.accounts["quarantined"]
    leases = [seconds for lane in lanes for seconds in lane.lease_s]
    beats = [seconds for lane in lanes for seconds in lane.beat_s]
    return [
        Figure(
            f"generators alive after {seconds:.0f} s", num_alive, "", f"of {NUM_GENERATORS:,}; {num_lapsed} leases lost"
        ),
        Figure("beats of the 10,000", len(beats) / seconds, "/s"),
        Figure("leases of the 10,000", len(leases) / seconds, "/s", f"{num / seconds:.0f} groups/s trained"),
        Figure("their beat, 99th percentile", _p99_ms(beats), "ms"),
        Figure("their lease, 99th percentile", _p99_ms(leases), "ms"),
        Figure("the ledger's core, with the 10,000", cpu_s / seconds, "busy"),
        Figure("memory of the ledger, with the 10,000", memory_bytes / 2**20, "MiB"),
    ]


def _lane_of_a_fleet(number: int, run: str, clients: list[Client]) -> Lane:
    connection = number % NUM_CONNECTIONS
    return Lane(f"generator-{number}", run, clients[connection], FLEET, 20, f"verifier-{connection}")


def _many_groups() -> list[Figure]:
    """A million groups through the state machine and the file, in a process that has done nothing else."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory)
        write_prompts(run_dir)
        store = Store(run_dir)
        ledger, evaluations = store.ledger(MANY, 0.0), store.evaluations(MANY, 0.0)
        version = ledger.begin(None)
        lane = Lane("generator-0", "", cast(Client, None), MANY, 4)
        memory: dict[int, int] = {}
        num_trained, began = 0, time.monotonic()
        while num_trained < MANY_GROUPS:
            for visit in ledger.grant("generator-0", version, MANY.groups_per_step, 0.0):
                scored = lane.scored(visit.key, version)
                ledger.store(scored, wire.encode(scored))
            batch = ledger.reserve(version, MANY.groups_per_step)
            ledger.commit(version, tuple(visit.number for visit in batch))
            version, num_trained = version.next(), num_trained + len(batch)
            if version.number % CHECKPOINT_EVERY == 0:
                ledger.checkpoint(version)
            store.save(ledger.drain(), evaluations.drain())
            memory[num_trained] = psutil.Process().memory_info().rss
        seconds, (of_accounts, of_groups) = time.monotonic() - began, store.size_bytes()
        store.close()
        began = time.monotonic()
        Store(run_dir).ledger(MANY, 0.0)
        reading_s = time.monotonic() - began
    early = min(size for num, size in memory.items() if num >= MANY_GROUPS // 10)
    return [
        Figure("memory over a million groups, after the 100,000th", (max(memory.values()) - early) / 2**20, "MiB more"),
        Figure("accounts on disk, a visit", of_accounts / MANY_GROUPS, "B", f"{of_groups / 1e6:.1f} MB of groups kept"),
        Figure("reading them back after a crash", reading_s, "s", f"written in {seconds:.0f} s"),
    ]


@contextlib.asynccontextmanager
async def _fleet_of(lanes: list[Lane], learner: LoadLearner) -> AsyncGenerator[list[asyncio.Task[None]]]:
    """Everyone has joined and beats; what is added to the list ends with the block."""
    await learner.begin()
    tasks = [asyncio.create_task(learner.beat())]
    try:
        for lane in {lane.verifier: lane for lane in lanes}.values():
            await lane.join_verifier()
            tasks.append(asyncio.create_task(lane.beat_verifier()))
        for lane in lanes:
            await lane.join()
            tasks.append(asyncio.create_task(lane.beat()))
        yield tasks
        for task in tasks:
            assert not task.done(), task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forever(learner: LoadLearner) -> None:
    while True:
        await learner.step()


def _p99_ms(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99)) * 1e3
