"""One engine for all of the generator's tests: it takes twenty seconds to start."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from common.config import Config, GeneratorConfig
from common.memory import MemoryDirectory
from common.versions import Version
from generator.engine import Engine
from tests.clocks import PATIENCE_S, SkippingLoop
from tests.generator.bigrams import write_bigram_model
from tests.leaks import living, nothing_left_open
from tests.models import write_tiny_model

SHARED_MEMORY = Path("/dev/shm")


class RunningEngine(NamedTuple):
    """An engine, how to run a coroutine in its loop, and its model."""

    engine: Engine
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    model: Path


async def until(holds: Callable[[], bool | Awaitable[bool]], what: str) -> None:
    """Waits until something holds, for at most `PATIENCE_S`."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        found = holds()
        if found if isinstance(found, bool) else await found:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"waited {PATIENCE_S:g} s for {what}")


@pytest.fixture(autouse=True, scope="package")
def module_leaves_nothing_open() -> Generator[None]:
    """Modules share an engine, with its tasks and sockets; when it is closed, nothing of it is left."""
    with nothing_left_open():
        yield


@contextmanager
def running_engine(config: Config) -> Generator[RunningEngine]:
    """An engine that holds version 0.0 of its model."""
    loop, model, memory = SkippingLoop(), Path(config.model), MemoryDirectory.make(SHARED_MEMORY, "engine-under-test")

    async def start() -> Engine:
        engine = Engine(config, memory.path)
        await engine.load(model, Version(0, 0))
        return engine

    policy = asyncio.get_event_loop_policy()
    engine = loop.run_until_complete(start())
    asyncio.set_event_loop_policy(policy)  # SGLang makes uvloop everyone's
    processes = [psutil.Process(process_id) for process_id in engine._engine.get_all_child_pids()]
    yield RunningEngine(engine, loop.run_until_complete, model)
    loop.run_until_complete(engine.close())
    assert not asyncio.all_tasks(loop)
    assert engine._manager.recv_from_detokenizer.closed
    assert engine._manager.send_to_scheduler.closed
    loop.close()
    assert not living(processes)
    assert [path.name[:6] for path in memory.path.iterdir()] == ["loads-"]  # what SGLang shares is there, not beside it
    memory.remove()


@pytest.fixture(scope="package")  # an idle engine keeps a core busy
def running(tmp_path_factory: pytest.TempPathFactory) -> Generator[RunningEngine]:
    """An engine of the tiny model, with room for long answers."""
    model = write_tiny_model(tmp_path_factory.mktemp("long") / "model", "qwen3", max_position_embeddings=32_768)
    with running_engine(Config(model=str(model), generator=GeneratorConfig())) as running:
        yield running


@pytest.fixture(scope="module")
def bigrams(running: RunningEngine, tmp_path_factory: pytest.TempPathFactory) -> Generator[RunningEngine]:
    """The shared engine with other weights, at the version that a new run begins with."""
    engine = running.engine
    assert engine.version is not None
    before, model = engine.version, tmp_path_factory.mktemp("bigrams") / "model"
    running.run(engine.load(write_bigram_model(model, running.model), Version(0, 0)))
    yield running._replace(model=model)
    running.run(engine.load(running.model, before.next()))
