"""One engine for all of the generator's tests: it takes twenty seconds to start."""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common import wire
from common.config import Config, GeneratorConfig
from common.versions import Version
from generator.engine import Engine


class RunningEngine(NamedTuple):
    """An engine, how to run a coroutine in its loop, and its model."""

    engine: Engine
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    model: Path


def manifest(path: Path, version: Version) -> wire.Manifest:
    """Of a version whose gate nobody asks for."""
    return wire.Manifest(version=version, path=str(path), size_bytes=1, probe_token_ids=b"", probe_logprobs=b"")


@pytest.fixture(scope="package")  # an idle engine keeps a core busy
def running(tiny_model: Path) -> Generator[RunningEngine]:
    """An engine that holds version 0.0 of the tiny model."""
    loop = asyncio.new_event_loop()

    async def start() -> Engine:
        engine = Engine(Config(model=str(tiny_model), generator=GeneratorConfig(max_total_tokens=16_384)))
        await engine.load(manifest(tiny_model, Version(0, 0)))
        return engine

    policy = asyncio.get_event_loop_policy()
    engine = loop.run_until_complete(start())
    asyncio.set_event_loop_policy(policy)  # SGLang makes uvloop everyone's
    yield RunningEngine(engine, loop.run_until_complete, tiny_model)
    engine.shutdown()
