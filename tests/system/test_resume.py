"""Runs that go on in their directory, by the command that started them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from common.rendezvous import RunKeys
from learner.saved import SavePoint
from tests.system.conftest import HANG_S, REPOSITORY, Run

pytestmark = [pytest.mark.full, pytest.mark.stops]

COMMON = ("run.resume=auto", "learner.checkpoint_every=2", "evaluation.every=14")


def test_a_run_goes_on_after_its_launcher_was_killed_and_after_it_was_stopped(start_run: Callable[..., Run]) -> None:
    killed = start_run(*COMMON, "steps=12")
    killed.wait_for_step(3)
    os.killpg(killed.launcher.pid, signal.SIGKILL)
    killed.wait()
    keys = RunKeys.load(killed.directory)

    stopped = start_run(*COMMON, "steps=12")
    stopped.wait_for_step(1, lineage=1)
    os.killpg(stopped.launcher.pid, signal.SIGINT)
    assert stopped.wait() == 130
    num_done = stopped.summary()["steps"]
    before = [(row["lineage"], row["step"]) for row in stopped.rows("step")]
    assert before[-1] == (1, num_done)

    run = start_run(*COMMON, "steps=14", "learner.parallel.data=2")
    assert run.wait() == 0
    run.assert_sound()
    assert f"goes on from its newest checkpoint; {num_done} steps were done" in run.output()
    assert "changed: steps: 12 before, 14 now" in run.output()
    assert "changed: learner.parallel.data: 1 before, 2 now" in run.output()
    shown = [line for line in run.output().splitlines() if line.startswith("step ")]
    assert shown[0].startswith(f"step {num_done + 1}/14: ")
    rows = [(row["lineage"], row["step"]) for row in run.rows("step")]
    assert rows == before + [(2, step) for step in range(num_done + 1, 15)]
    assert all(row["grad_norm"] > 0 for row in run.rows("step"))
    assert set(run.accuracies()) == {0, 14}
    assert RunKeys.load(run.directory) == keys
    assert run.summary()["steps"] == 14
    assert (Path(run.summary()["checkpoint"]) / "model.safetensors.index.json").exists(), "two ranks wrote it"
    _check_what_is_said_afterwards(run)
    _check_that_a_checkpoint_of_another_time_is_refused_once(run)


def _check_what_is_said_afterwards(run: Run) -> None:
    """A complete run is complete, and what may not change is refused."""
    complete = _cluster(run.directory, "steps=14", "learner.parallel.data=2")
    assert complete.returncode == 0, complete.stderr
    assert "is complete: all 14 steps are done" in complete.stdout
    fewer = _cluster(run.directory, "steps=13")
    assert fewer.returncode == 2
    assert "steps: found 13, expected at least 14: so many are done" in fewer.stderr
    smaller = _cluster(run.directory, "steps=15", "group_size=8", "--dry-run")
    assert smaller.returncode == 2
    assert "group_size: found 8, expected 16 as in" in smaller.stderr
    assert "only these keys may change: steps, made_for, run.*" in smaller.stderr
    more = _cluster(run.directory, "steps=15", "--dry-run")
    assert more.returncode == 0, more.stderr
    assert "goes on from its newest checkpoint; 14 steps were done" in more.stdout


def _check_that_a_checkpoint_of_another_time_is_refused_once(run: Run) -> None:
    checkpoint = run.directory / "checkpoints" / "step-000014"
    point = SavePoint.read(checkpoint)
    msgspec.structs.replace(point, sequence=point.sequence + 1).write(checkpoint)
    refused = _cluster(run.directory, "steps=15")
    assert refused.returncode == 2, refused.stdout
    assert f"expected commit {point.sequence} of the ledger" in refused.stderr
    assert "restart" not in refused.stdout


def _cluster(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/cluster.py", "--layout", "local", f"run.dir={run_dir}", *COMMON, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG_S, check=False)
