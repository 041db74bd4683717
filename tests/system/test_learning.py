"""Whether it learns, and whether it learns from the reward and from nothing else."""

from collections.abc import Callable

import pytest

from tests.system.conftest import Run

TWENTY = ("steps=20", "evaluation.every=20", "learner.checkpoint_every=20")


def test_accuracy_rises_in_twenty_steps_and_with_shuffled_rewards_it_does_not(start_run: Callable[..., Run]) -> None:
    """The same run twice; the control permutes each group's rewards, so that they say nothing of the answers."""
    gains = {}
    for shuffled in ("false", "true"):
        run = start_run(*TWENTY, f"loss.shuffle_rewards={shuffled}", name=f"shuffled-{shuffled}")
        assert run.wait() == 0, run.output()[-3000:]
        run.assert_sound()
        accuracies = run.accuracies()
        gains[shuffled] = accuracies[20] - accuracies[0]
    assert gains["false"] > 0.3, gains
    assert gains["true"] < 0.1, gains


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_local_layout_reaches_its_accuracy_from_three_seeds(start_run: Callable[..., Run]) -> None:
    for seed in (1, 2, 3):
        run = start_run(f"seed={seed}", name=f"seed-{seed}")
        assert run.wait(600) == 0, run.output()[-3000:]
        run.assert_sound()
        summary = run.summary()
        assert summary["accuracy_start"] <= 0.45
        assert summary["accuracy_end"] >= 0.80
        assert summary["seconds"] <= 360
