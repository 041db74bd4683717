"""Processes that die in the middle of a run, and runs that are stopped."""

import os
import signal
from collections.abc import Callable

import psutil

from tests.system.conftest import Run


def test_a_verifier_a_generator_and_the_ledger_that_are_killed_are_survived(start_run: Callable[..., Run]) -> None:
    run = start_run("steps=14", "evaluation.every=14", "lease.heartbeat_timeout_s=5", "learner.checkpoint_every=14")
    run.wait_for_step(2)
    run.kill("verifier")
    run.wait_for_step(5)
    run.kill("generator")
    run.wait_for_step(8)
    run.kill("learner.ledger")
    assert run.wait() == 0, run.output()[-3000:]
    run.assert_sound()
    assert run.output().count("started again") >= 2 or "restart" in run.output()
    assert [row["step"] for row in run.rows("step")] == list(range(1, 15))


def test_a_learner_that_is_killed_goes_on_from_its_checkpoint_in_a_new_lineage(start_run: Callable[..., Run]) -> None:
    run = start_run("steps=8", "evaluation.every=8", "learner.checkpoint_every=3")
    run.wait_for_step(5)
    run.kill("learner")
    assert run.wait() == 0, run.output()[-3000:]
    run.assert_sound()
    rows = [(row["lineage"], row["step"]) for row in run.rows("step")]
    assert rows[:5] == [(0, step) for step in range(1, 6)]
    assert rows[-1] == (1, 8)
    resumed = [step for lineage, step in rows if lineage == 1]
    assert resumed in (list(range(4, 9)), list(range(7, 9)))


def test_ctrl_c_saves_a_checkpoint_and_stops_everything_in_order(start_run: Callable[..., Run]) -> None:
    run = start_run("steps=500")
    run.wait_for_step(2)
    os.killpg(run.launcher.pid, signal.SIGINT)
    assert run.wait(90) == 130, run.output()[-3000:]
    run.assert_nothing_is_left()
    summary = run.summary()
    assert summary["steps"] >= 2
    assert (run.directory / "checkpoints").exists()
    assert summary["checkpoint"].endswith(f"step-{summary['steps']:06d}/huggingface")
    assert run.audit().returncode == 0


def test_a_launcher_that_is_killed_leaves_no_process(start_run: Callable[..., Run]) -> None:
    run = start_run("steps=500")
    run.wait_for_step(1)
    children = psutil.Process(run.launcher.pid).children(recursive=True)
    assert len(children) > 6
    run.launcher.send_signal(signal.SIGKILL)
    run.launcher.wait(10)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, [p.cmdline() for p in alive]


def test_an_engine_that_differs_from_the_learner_stops_the_run_with_a_message(start_run: Callable[..., Run]) -> None:
    run = start_run("generator.gate_max=1e-12")
    assert run.wait(120) == 4, run.output()[-3000:]
    assert "generator-0" in run.output().splitlines()[-1]
    assert "expected at most 1e-12: the engine does not hold the learner's weights" in run.output()
    assert not run.rows("step")
    run.assert_nothing_is_left()


def test_a_process_that_dies_once_too_often_ends_the_run_and_all_the_others(start_run: Callable[..., Run]) -> None:
    run = start_run("run.max_restarts=0", "steps=500")
    run.wait_for_step(1)
    run.kill("verifier")
    assert run.wait(90) == 1, run.output()[-3000:]
    assert "verifier-0" in run.output().splitlines()[-1]
    run.assert_nothing_is_left()
    assert run.audit().returncode == 0
