"""Runs that are stopped, and processes that fail for good."""

from collections.abc import Callable

import pytest

from tests.system.conftest import Run

pytestmark = [pytest.mark.full, pytest.mark.stops]


def test_ctrl_c_saves_a_checkpoint_and_stops_everything_in_order(start_run: Callable[..., Run]) -> None:
    run = start_run("steps=500")
    run.wait_for_step(2)
    run.finish()
    run.assert_nothing_is_left()
    assert run.summary()["steps"] >= 2
    assert run.audit().returncode == 0


def test_an_engine_that_differs_from_the_learner_stops_the_run_with_a_message(start_run: Callable[..., Run]) -> None:
    run = start_run("generator.gate_max=1e-12")
    assert run.wait() == 4
    assert "generator-0" in run.output().splitlines()[-1]
    assert "expected at most 1e-12: the engine does not hold the learner's weights" in run.output()
    assert not run.rows("step")
    run.assert_nothing_is_left()


def test_a_process_that_dies_once_too_often_ends_the_run_and_all_the_others(start_run: Callable[..., Run]) -> None:
    run = start_run("run.max_restarts=0", "steps=500")
    run.wait_for_step(1)
    run.kill("verifier")
    assert run.wait() == 1
    assert "verifier-0" in run.output().splitlines()[-1]
    run.assert_nothing_is_left()
    assert run.audit().returncode == 0
