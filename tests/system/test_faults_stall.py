"""A run that cannot go on."""

from collections.abc import Callable

import pytest

from tests.system.accounts import Cost, cost
from tests.system.conftest import ENDLESS, Run

pytestmark = [pytest.mark.full, pytest.mark.faults]

STALL_S = 180  # longer than an engine takes to start on a busy machine


def test_a_run_whose_generators_all_stand_still_stops_and_says_so(
    start_run: Callable[..., Run], report: Callable[[str, str, Cost], None]
) -> None:
    run = start_run(
        *ENDLESS,
        "learner.checkpoint_every=1000",
        "lease.heartbeat_timeout_s=10",
        f"run.stall_timeout_s={STALL_S}",
        "run.stop_timeout_s=5",
    )
    run.wait_for_step(3)
    run.stop("generator")
    assert run.wait() == 3
    last = run.output().splitlines()[-1]
    assert last.startswith(f"sluice: learner: the learner waited {STALL_S} s for "), last
    assert "no generator is alive" in last
    assert "generator-0 did not stop within 5 s and is killed" in run.output()
    run.assert_nothing_is_left()
    assert run.audit().returncode == 0, run.audit().stdout
    num_steps = run.rows("step")[-1]["step"]
    assert [path.name for path in (run.directory / "checkpoints").glob("step-*")] == [f"step-{num_steps:06d}"]
    report(
        "all generators stand still (SIGSTOP)",
        "after `run.stall_timeout_s` exit code 3, with what the run waited for; what is trained is saved",
        cost(run.directory),
    )
