"""A generator that is asked to stop, as a process."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common import wire
from common.sections import SamplingConfig
from common.versions import Version
from tests.generator.bigrams import ENDLESS, write_bigram_model
from tests.generator.sites import NAME, make_run
from tests.learner.ledger.roles import ROOT, Learner, serving
from tests.models import write_tiny_model

PROBE = np.full(16, ENDLESS, np.int32)  # each is certain after the one before: a logprob of 0


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_generator_that_gets_sigterm_gives_its_leases_back_before_it_ends(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "qwen3", max_position_embeddings=4096)
    model = write_bigram_model(tmp_path / "model", base)
    long = SamplingConfig(max_tokens=3000)
    config = make_run(tmp_path / "run", model, ["b"] * 4, group_size=4, max_staleness=0, sampling=long)

    async def scenario() -> tuple[float, wire.StatusReport, int]:
        async with serving(tmp_path / "run") as (_, client):
            learner = Learner(client, config)
            await learner.begin()
            probe = {"probe_token_ids": wire.int_bytes(PROBE), "probe_logprobs": wire.float_bytes([0.0] * 15)}
            manifest = wire.Manifest(version=Version(0, 0), path=str(model), size_bytes=1, **probe)
            await client.ask(wire.Publish(manifest=manifest), wire.Done, deadline_s=30)
            generator = start_generator(tmp_path / "run")
            try:
                report = await client.ask(wire.Status(), wire.StatusReport, deadline_s=30)
                while report.accounts["leased"] < 2:
                    await asyncio.sleep(0.1)
                    report = await client.ask(wire.Status(), wire.StatusReport, deadline_s=30)
                generator.send_signal(signal.SIGTERM)
                stopped = time.monotonic()
                while report.accounts["leased"]:
                    await asyncio.sleep(0.02)
                    report = await client.ask(wire.Status(), wire.StatusReport, deadline_s=30)
                return time.monotonic() - stopped, report, await asyncio.to_thread(generator.wait, 60)
            finally:
                generator.kill()

    seconds, report, code = asyncio.run(scenario())
    assert code == 0
    assert (report.accounts["waiting"], report.members) == (2, ())
    assert seconds < config.lease.heartbeat_timeout_s / 3


def start_generator(run_dir: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "generator", str(run_dir), NAME], cwd=ROOT, env=environment)
