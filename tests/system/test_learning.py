"""Whether it learns, and whether it learns from the reward and from nothing else.

Limits are five standard deviations or more from the means seen on 2026-11-30 on two cores, which is less than one in a
million: accuracy rose in twenty steps by 0.39 (0.05 between six runs), with shuffled rewards by -0.02 (0.05 between
four); after sixty it was 0.92 (0.04 between three seeds, of whose mean 0.80 is five deviations below).
"""

from collections.abc import Callable

import pytest

from tests.system.conftest import HANG_S, Run

pytestmark = [pytest.mark.full, pytest.mark.learning, pytest.mark.timeout(4 * HANG_S)]

TWENTY = ("steps=20", "evaluation.every=20", "learner.checkpoint_every=20")


def test_accuracy_rises_in_twenty_steps_and_with_shuffled_rewards_it_does_not(start_run: Callable[..., Run]) -> None:
    assert_learns_from_rewards(_gains(start_run, "local"))


def test_eight_ranks_that_share_experts_learn_along_the_routes_of_the_engine(start_run: Callable[..., Run]) -> None:
    assert_learns_from_rewards(_gains(start_run, "ep8-tiny"))


def assert_learns_from_rewards(gains: dict[str, float]) -> None:
    """By what accuracy gained without and with `loss.shuffle_rewards`."""
    assert gains["false"] > 0.14, gains
    assert gains["true"] < 0.24, gains
    assert gains["false"] > gains["true"], gains


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
    ends: list[float] = []
    for seed in (1, 2, 3):
        run = start_run(f"seed={seed}", name=f"seed-{seed}")
        assert run.wait() == 0
        run.assert_sound()
        assert run.summary()["accuracy_start"] <= 0.63  # tests/system/test_local_run.py says why
        ends.append(run.summary()["accuracy_end"])
    assert min(ends) > 0.7, ends
    assert sum(ends) / len(ends) > 0.8, ends
