"""Whether it learns, and whether it learns from the reward and from nothing else."""

from collections.abc import Callable

import pytest

from tests.system.conftest import HANG_S, Run

pytestmark = [pytest.mark.full, pytest.mark.learning, pytest.mark.timeout(4 * HANG_S)]

TWENTY = ("steps=20", "evaluation.every=20", "learner.checkpoint_every=20")


def test_accuracy_rises_in_twenty_steps_and_with_shuffled_rewards_it_does_not(start_run: Callable[..., Run]) -> None:
    gains = _gains(start_run, "local")
    assert gains["false"] > 0.3, gains
    assert gains["true"] < 0.1, gains


def test_eight_ranks_that_share_experts_learn_along_the_routes_of_the_engine(start_run: Callable[..., Run]) -> None:
    gains = _gains(start_run, "ep8-tiny")
    assert gains["false"] > 0.2, gains
    assert gains["true"] < 0.1, gains


def _gains(start_run: Callable[..., Run], layout: str) -> dict[str, float]:
    """Of a layout's run and of a control, which permutes each group's rewards, so that they say nothing of answers."""
    gains: dict[str, float] = {}
    for shuffled in ("false", "true"):
        name = f"shuffled-{shuffled}"
        run = start_run(*TWENTY, f"loss.shuffle_rewards={shuffled}", name=name, layout=layout)
        assert run.wait() == 0
        run.assert_sound()
        accuracies = run.accuracies()
        gains[shuffled] = accuracies[20] - accuracies[0]
    return gains


def test_the_local_layout_reaches_its_accuracy_from_three_seeds(start_run: Callable[..., Run]) -> None:
    for seed in (1, 2, 3):
        run = start_run(f"seed={seed}", name=f"seed-{seed}")
        assert run.wait() == 0
        run.assert_sound()
        summary = run.summary()
        assert summary["accuracy_start"] <= 0.45
        assert summary["accuracy_end"] >= 0.80
