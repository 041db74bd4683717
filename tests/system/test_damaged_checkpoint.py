"""Checkpoints that are damaged while the learner is dead: the run goes on from the one before, or begins again."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.saved import directories
from tests.learner.saves import flip_a_bit
from tests.system.accounts import Cost
from tests.system.conftest import HANG_S, REPOSITORY, Run

pytestmark = [pytest.mark.full, pytest.mark.faults]

SMALL = (
    "groups_per_step=4",
    "group_size=8",
    "updates_per_step=2",
    "evaluation.every=100",
    "learner.checkpoint_every=5",
)
REPEATED = ("loss", "grad_norm", "reward", "num_tokens", "staleness_mean", "staleness_max", "ratio_mean", "weight_mean")
DATA = "megatron/__0_0.distcp"


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(
    start_run: Callable[..., Run], report: Callable[[str, str, Cost], None]
) -> None:
    run = start_run("steps=20", *SMALL)
    (only,), _ = _damage_the_newest_and_kill_the_learner(run, num_checkpoints=1)
    (before, newest), killed_at = _damage_the_newest_and_kill_the_learner(run, num_checkpoints=2)
    assert run.wait() == 0
    report(
        "a bit of the newest checkpoint flips, and the learner is killed",
        "it goes on from the checkpoint before, says so, and repeats the steps since with their groups",
        run.assert_survived(killed_at),
    )
    _check_what_is_said(run, only, "the starting weights")
    _check_what_is_said(run, newest, before.name)
    assert run.output().count("no checkpoint to go on from: the learner begins with the starting weights") == 1
    number = int(before.name[-6:])
    rows = {(row["lineage"], row["step"]): row for row in run.rows("step")}
    steps = [[step for lineage, step in rows if lineage == wanted] for wanted in range(3)]
    assert steps[0] == list(range(1, len(steps[0]) + 1))
    assert steps[1] == list(range(1, len(steps[1]) + 1))
    assert steps[2] == list(range(number + 1, 21))
    assert _numbers(rows[1, 1]) == _numbers(rows[0, 1]), "an undone step is repeated with its groups, bit for bit"
    assert _numbers(rows[2, number + 1]) == _numbers(rows[1, number + 1])
    assert rows[2, number + 1]["grad_norm"] > 0
    _check_that_nothing_is_done_where_none_is_whole(run)


def _damage_the_newest_and_kill_the_learner(run: Run, num_checkpoints: int) -> tuple[list[Path], float]:
    """Waits for so many checkpoints; returns them, oldest first, and when the learner was killed."""
    checkpoints = run.directory / "checkpoints"
    run.wait_until(lambda: len(directories(checkpoints)) >= num_checkpoints, f"{num_checkpoints} checkpoints")
    run.stop("learner")  # no checkpoint is saved between the damage and the death
    found = directories(run.directory / "checkpoints")
    flip_a_bit(found[-1] / DATA)
    return found, run.kill("learner")


def _check_what_is_said(run: Run, damaged: Path, instead: str) -> None:
    line = (
        f"the checkpoint {damaged.name} is damaged, the learner goes on from {instead} (kept as "
        f"damaged-{damaged.name}): {damaged / DATA}: found checksum "
    )
    assert run.output().count(line) == 1
    log = (run.directory / "logs" / "learner-0.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, log) if event["event"] == "checkpoint_damaged"]
    assert (damaged.name, instead) in [(event["checkpoint"], event["instead"]) for event in events]
    assert (damaged.parent / f"damaged-{damaged.name}" / "version.json").exists()


def _check_that_nothing_is_done_where_none_is_whole(run: Run) -> None:
    whole = directories(run.directory / "checkpoints")
    for path in whole:
        flip_a_bit(path / DATA)
    left = sorted((run.directory / "checkpoints").iterdir())
    command = [sys.executable, "launch/cluster.py", "--layout", "local", f"run.dir={run.directory}", *SMALL]
    command += ["steps=21", "run.resume=auto", "run.stop_timeout_s=10"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert ended.returncode == 2, ended.stdout
    named = ", ".join(path.name for path in reversed(whole))
    assert f"found damage in {named} ({whole[-1] / DATA}: found checksum" in ended.stderr
    assert "no whole checkpoint that the ledger can go on from" in ended.stderr
    assert "older are not kept" in ended.stderr
    assert sorted((run.directory / "checkpoints").iterdir()) == left


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in REPEATED}
