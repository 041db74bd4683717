"""Weights on their way in whole runs: to one who shares nothing but the run directory, and past what is killed."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.system.accounts import makers
from tests.system.conftest import ENDLESS, Run
from tests.system.namespaces import HERE, distant_generator, two_machines

pytestmark = [pytest.mark.full, pytest.mark.weights]

BFLOAT16 = ("learner.dtype=bfloat16", "generator.dtype=bfloat16", "optimizer.lr=1e-5", "weights.anchor_every=4")


def loads(run: Run, name: str) -> list[dict[str, Any]]:
    """What each version cost a generator."""
    return run.events(name, "weights_loaded")


def test_a_generator_that_shares_nothing_but_the_run_directory_trains_ten_steps_with_the_others(
    start_run: Callable[..., Run],
) -> None:
    with two_machines() as names:
        run = start_run(*ENDLESS, *BFLOAT16, f"run.host={HERE}", prefix=names.prefix)
        run.wait_for_step(1)
        with distant_generator(run, names, "generator-1", run.model()):
            run.wait_until(lambda: loads(run, "generator-1"), "generator-1 to have weights")
            run.wait_for_steps(10)
            run.wait_until(lambda: len(loads(run, "generator-1")) > 3, "generator-1 to have three deltas")
            first, *rest = loads(run, "generator-1")
        run.finish()
    assert first["num_whole"] == 1
    assert 0 < min(load["pulled_bytes"] for load in rest) < first["pulled_bytes"] / 10
    assert makers(run.directory) == {"generator-0", "generator-1"}
    row = run.rows("step")[-1]
    assert 0 < row["delta_share"] < 0.1
    assert min(row[f"weights_{name}"] for name in ("transfer_s", "decode_s", "pause_s", "pulled_bytes")) > 0
    run.assert_sound()


def test_a_publisher_that_is_killed_is_started_again_and_the_run_goes_on(start_run: Callable[..., Run]) -> None:
    run = start_run(*ENDLESS, *BFLOAT16)
    run.wait_for_step(2)
    killed_at = run.kill("learner.publisher")
    run.wait_for_recovery(killed_at)
    before = len(loads(run, "generator-0"))
    run.wait_until(lambda: any(not load["num_whole"] for load in loads(run, "generator-0")[before:]), "a delta again")
    run.finish()
    assert "restart" not in run.output()
    run.assert_sound()
