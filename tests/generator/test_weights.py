"""How a generator follows what is published, with a real engine and real publishers: whom it gives up, and when."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from common import wire
from common.config import Config
from common.errors import RefusedError
from common.membership import Activity
from common.rendezvous import RunKeys
from common.sections import RunConfig
from common.transport import Client
from common.versions import Version
from generator.weights import Weights
from generator.weights_copy import Brought, WeightsCopy
from tests.clocks import PATIENCE_S, move_time
from tests.generator.conftest import RunningEngine, until
from tests.generator.sites import make_run
from tests.publishing import publishing

TOKENS = np.arange(2, 18, dtype=np.int32)


@pytest.fixture
def config(running: RunningEngine, tmp_path: Path) -> Config:
    return make_run(tmp_path / "run", running.model, ["a"], run=RunConfig(stall_timeout_s=PATIENCE_S))


@asynccontextmanager
async def following(running: RunningEngine, config: Config, tmp_path: Path) -> AsyncGenerator[Weights]:
    """A generator's weights, which follow what the test puts into their directory."""
    (tmp_path / "memory").mkdir()
    keys = RunKeys.load(tmp_path / "run")
    copy = WeightsCopy(tmp_path / "memory", running.model, keys, deadline_s=PATIENCE_S)

    async def nothing() -> None:
        pass

    async with Client(lambda: "", keys=keys, name="ledger") as ledger:
        yield Weights(running.engine, copy, ledger, config, Activity(), before_load=nothing)


def hear(weights: Weights, manifest: wire.Manifest) -> None:
    weights.directory = wire.Directory(
        revision=weights.directory.revision + 1, manifest=manifest, verifiers=(), closing=False
    )
    weights._changed.set()


async def probe(running: RunningEngine) -> dict[str, bytes]:
    """What a learner says of the weights that the engine has."""
    logprobs = await running.engine.logprobs(TOKENS)
    return {"probe_token_ids": wire.int_bytes(TOKENS), "probe_logprobs": wire.float_bytes(logprobs)}


def test_a_pull_from_a_learner_that_is_gone_is_given_up_for_another_ones(
    running: RunningEngine, config: Config, tmp_path: Path
) -> None:
    part = running.model / "model.safetensors"

    async def scenario() -> None:
        known = await probe(running)
        with (
            publishing(tmp_path / "run", tmp_path / "gone") as gone,
            publishing(tmp_path / "run", tmp_path / "next") as following_one,
        ):
            first = gone.publish(Version(7, 0), [part], **known)
            process = gone.links[0]._process
            assert process is not None
            os.kill(process.pid, signal.SIGSTOP)
            async with following(running, config, tmp_path) as weights:
                hear(weights, first)
                task = asyncio.create_task(weights.follow())
                await until(lambda: bool(weights._copy._held), "the pull to begin")
                assert not weights.ready.is_set()
                hear(weights, following_one.publish(Version(8, 0), [part], **known))
                await until(weights.ready.is_set, "the other learner's version")
                assert running.engine.version == Version(8, 0)
                task.cancel()
                await asyncio.wait({task})
            os.kill(process.pid, signal.SIGCONT)

    running.run(scenario())


def test_where_no_version_can_be_pulled_the_generator_ends_with_the_reason_after_a_while(
    running: RunningEngine, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = running.model / "model.safetensors"

    async def scenario() -> None:
        with publishing(tmp_path / "run", tmp_path / "published") as publishers:
            publishers.publish(Version(9, 1), [part])
            lost = publishers.manifest(Version(9, 0))
            async with following(running, config, tmp_path) as weights:
                hear(weights, lost)
                bring, num_refused = weights._copy.bring, 0

                async def counted(manifest: wire.Manifest) -> Brought:
                    nonlocal num_refused
                    try:
                        return await bring(manifest)
                    except RefusedError:
                        num_refused += 1
                        if num_refused == 3:  # no request is under way that would be late, too
                            move_time(PATIENCE_S + 1)
                        raise

                monkeypatch.setattr(weights._copy, "bring", counted)
                with pytest.raises(RefusedError, match=r"part 0: found version 9\.1 published, expected 9\.0"):
                    await weights.follow()
                assert num_refused == 3

    running.run(scenario())


def test_one_that_joins_at_version_300_has_that_one_first(
    running: RunningEngine, config: Config, tmp_path: Path
) -> None:
    part = running.model / "model.safetensors"

    async def scenario() -> None:
        known = await probe(running)
        with publishing(tmp_path / "run", tmp_path / "published") as publishers:
            for number in (298, 299, 300):
                newest = publishers.publish(Version(10, number), [part], **known)
            async with following(running, config, tmp_path) as weights:
                hear(weights, newest)
                task = asyncio.create_task(weights.follow())
                held: set[Version | None] = set()
                while not weights.ready.is_set():
                    held.add(running.engine.version)
                    await asyncio.sleep(0.001)
                assert running.engine.version == Version(10, 300)
                assert not {version for version in held if version in (Version(10, 298), Version(10, 299))}
                task.cancel()
                await asyncio.wait({task})

    running.run(scenario())
