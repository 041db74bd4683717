"""A generator that is asked to stop, as a process."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
import pytest

from common import wire
from common.memory import MemoryDirectory
from common.sections import LeaseConfig, RunConfig, SamplingConfig, WeightsConfig
from common.transport import Client
from common.versions import Version
from tests.clocks import PATIENCE_S
from tests.generator.bigrams import ENDLESS, write_bigram_model
from tests.generator.conftest import until
from tests.generator.sites import NAME, make_run
from tests.leaks import living
from tests.learner.ledger.roles import ROOT, Learner, serving
from tests.models import write_tiny_model
from tests.publishing import publishing

PROBE = np.full(16, ENDLESS, np.int32)  # each is certain after the one before: a logprob of 0
PATIENT = RunConfig(stop_timeout_s=6 * PATIENCE_S)  # of which a load that is under way has a part


@asynccontextmanager
async def generator_of(
    tmp_path: Path, module: tuple[str, ...] = ("generator",), **changes: Any
) -> AsyncGenerator[tuple[Client, wire.Publish, subprocess.Popen[bytes]]]:
    """The ledger of a run of endless answers, its first version, not published yet, and a generator that starts.

    `module` is what Python runs, before the run and the name.
    """
    base = write_tiny_model(tmp_path / "base", "qwen3", max_position_embeddings=4096)
    model = write_bigram_model(tmp_path / "model", base)
    long = SamplingConfig(max_tokens=3000)
    config = make_run(tmp_path / "run", model, ["b"] * 4, group_size=4, max_staleness=0, sampling=long, **changes)
    probe = {"probe_token_ids": wire.int_bytes(PROBE), "probe_logprobs": wire.float_bytes([0.0] * 15)}
    publishers = publishing(tmp_path / "run", tmp_path / "published")
    async with serving(tmp_path / "run") as (_, client):
        await Learner(client, config).hello()
        await client.ask(wire.Begin(checkpoint=None, sequence=0), wire.Begun, deadline_s=PATIENCE_S)
        with publishers as publisher, (tmp_path / "stderr").open("wb") as stderr:
            first = publisher.publish(Version(0, 0), [model / "model.safetensors"], **probe)
            generator = start_generator(tmp_path / "run", stderr, module)
            try:
                yield client, wire.Publish(manifest=first), generator
            finally:
                generator.kill()


@pytest.mark.full
@pytest.mark.stops
def test_a_generator_that_gets_sigterm_gives_its_leases_back_before_it_ends(tmp_path: Path) -> None:
    lease = LeaseConfig(heartbeat_timeout_s=2 * PATIENCE_S)  # what is given back sooner was not taken for dead

    async def scenario() -> tuple[wire.StatusReport, int]:
        async with generator_of(tmp_path, lease=lease) as (client, first, generator):
            await client.ask(first, wire.Done, deadline_s=PATIENCE_S)
            await until(lambda: has_leased(client, 2), "two leases")
            generator.send_signal(signal.SIGTERM)
            await until(lambda: has_leased(client, 0), "no leases")
            code = await asyncio.to_thread(generator.wait, PATIENCE_S)
            return await client.ask(wire.Status(), wire.StatusReport, deadline_s=PATIENCE_S), code

    report, code = asyncio.run(scenario())
    assert code == 0
    assert report.accounts["waiting"] == 2
    assert wire.Role.GENERATOR not in {member.role for member in report.members}


def test_a_generator_that_is_stopped_while_it_loads_ends_after_the_load_and_says_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with generator_of(tmp_path, run=PATIENT) as (client, first, generator):
            scheduler, started = await begin_load(tmp_path, client, first, generator)
            await assert_ends_after(scheduler.resume, tmp_path, generator, started)

    asyncio.run(scenario())


@pytest.mark.full
@pytest.mark.stops
@pytest.mark.parametrize("request_", ["pause_generation", "update_weights_from_disk", "continue_generation"])
def test_a_generator_that_is_stopped_at_any_moment_of_an_update_ends_after_it(tmp_path: Path, request_: str) -> None:
    run_dir = tmp_path / "run"

    async def scenario() -> None:
        held = generator_of(tmp_path, ("tests.generator.held", request_), run=PATIENT)
        async with held as (client, first, generator):
            await client.ask(first, wire.Done, deadline_s=PATIENCE_S)
            await until((run_dir / "held").exists, "the request")
            started = psutil.Process(generator.pid).children(recursive=True)
            await assert_ends_after((run_dir / "go").touch, tmp_path, generator, started)

    asyncio.run(scenario())


async def assert_ends_after(
    let_go: Callable[[], None], tmp_path: Path, generator: subprocess.Popen[bytes], started: list[psutil.Process]
) -> None:
    """A generator that is asked to stop waits for what is under way, ends once it is let go, and says nothing more."""
    num_bytes = (tmp_path / "stderr").stat().st_size
    generator.send_signal(signal.SIGTERM)
    await until(lambda: has_logged(tmp_path, "engine_finishes"), "the generator to wait for what is under way")
    let_go()
    assert await asyncio.to_thread(generator.wait, PATIENCE_S) == 0
    await until(lambda: not living(started), "its processes to end")
    assert has_logged(tmp_path, "stopped")
    assert not has_logged(tmp_path, "engine_given_up")
    said = (tmp_path / "stderr").read_text()[num_bytes:]
    lines = [line for line in said.splitlines() if line and "loading shards" not in line]  # SGLang's bar of a load
    assert lines == []


@pytest.mark.full
@pytest.mark.stops
def test_a_generator_whose_load_never_ends_gives_it_up_and_leaves_no_process(tmp_path: Path) -> None:
    async def scenario() -> int:
        async with generator_of(tmp_path, run=RunConfig(stop_timeout_s=4.0)) as (client, first, generator):
            _, started = await begin_load(tmp_path, client, first, generator)
            generator.send_signal(signal.SIGTERM)
            code = await asyncio.to_thread(generator.wait, PATIENCE_S)
            await until(lambda: not living(started), "its processes to end")
            return code

    assert asyncio.run(scenario()) == 0
    assert has_logged(tmp_path, "engine_given_up")


@pytest.mark.full
@pytest.mark.stops
def test_a_generator_that_is_killed_leaves_nothing_that_the_next_does_not_remove(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    weights = WeightsConfig(dir=str(tmp_path / "memory"))

    def loads() -> set[Path]:
        return set(Path("/dev/shm").glob("sglang_loads_*"))

    async def scenario() -> None:
        async with generator_of(tmp_path, weights=weights) as (client, first, generator):
            await client.ask(first, wire.Done, deadline_s=PATIENCE_S)
            await until(lambda: has_logged(tmp_path, "weights_loaded"), "weights")
            started = psutil.Process(generator.pid).children(recursive=True)
            (own,) = (path for path in (tmp_path / "memory").iterdir() if path.is_dir())
            assert {"weights", "pulled"} < {path.name for path in own.iterdir()}
            assert list(own.glob("loads-*"))
            generator.kill()
            generator.wait()
            await until(lambda: not living(started), "its processes to end")
            assert own.is_dir()

    before = loads()
    asyncio.run(scenario())
    assert loads() <= before
    with MemoryDirectory.make(tmp_path / "memory", "generator-0") as directory:
        assert {path.name for path in (tmp_path / "memory").iterdir()} == {
            directory.path.name,
            f"{directory.path.name}.lock",
        }


async def begin_load(
    tmp_path: Path, client: Client, first: wire.Publish, generator: subprocess.Popen[bytes]
) -> tuple[psutil.Process, list[psutil.Process]]:
    """Publishes the first version; the scheduler stands still, so that its load takes as long as a test wants.

    Returns the scheduler, and all that the generator started.
    """
    await until(lambda: has_logged(tmp_path, "ready"), "the engine")
    started = psutil.Process(generator.pid).children(recursive=True)
    (scheduler,) = [process for process in started if "scheduler" in process.name()]
    scheduler.suspend()
    await client.ask(first, wire.Done, deadline_s=PATIENCE_S)
    await until(lambda: has_logged(tmp_path, "weights_loading"), "the load to begin")
    return scheduler, started


def has_logged(tmp_path: Path, event: str) -> bool:
    log = tmp_path / "run" / "logs" / f"{NAME}.jsonl"
    return log.exists() and f'"event": "{event}"' in log.read_text()


async def has_leased(client: Client, num: int) -> bool:
    report = await client.ask(wire.Status(), wire.StatusReport, deadline_s=PATIENCE_S)
    return report.accounts["leased"] == num


def start_generator(run_dir: Path, stderr: BinaryIO, module: tuple[str, ...]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *module, str(run_dir), NAME]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr)
