"""One engine for all of the generator's tests: it takes twenty seconds to start."""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common import wire
from common.config import Config, GeneratorConfig
from common.versions import Version
from generator.engine import Engine
from tests.models import write_tiny_model


class RunningEngine(NamedTuple):
    """An engine, how to run a coroutine in its loop, and its model."""

    engine: Engine
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    model: Path


def manifest(path: Path, version: Version) -> wire.Manifest:
    """Of a version whose gate nobody asks for."""
    return wire.Manifest(version=version, path=str(path), size_bytes=1, probe_token_ids=b"", probe_logprobs=b"")


@contextmanager
def running_engine(config: Config) -> Generator[RunningEngine]:
    """An engine that holds version 0.0 of its model."""
    loop, model = asyncio.new_event_loop(), Path(config.model)

    async def start() -> Engine:
        engine = Engine(config)
        await engine.load(manifest(model, Version(0, 0)))
        return engine

    policy = asyncio.get_event_loop_policy()
    engine = loop.run_until_complete(start())
    asyncio.set_event_loop_policy(policy)  # SGLang makes uvloop everyone's
    yield RunningEngine(engine, loop.run_until_complete, model)
    engine.shutdown()


@pytest.fixture(scope="package")  # an idle engine keeps a core busy
def running(tmp_path_factory: pytest.TempPathFactory) -> Generator[RunningEngine]:
    """An engine of the tiny model, with room for long answers."""
    model = write_tiny_model(tmp_path_factory.mktemp("long") / "model", "qwen3", max_position_embeddings=4096)
    with running_engine(Config(model=str(model), generator=GeneratorConfig(max_total_tokens=16_384))) as running:
        yield running
