"""A step on groups without their late completions, against numbers that are written out."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from common import wire
from common.config import Config
from common.sections import SamplingConfig
from common.versions import Lineages, Version
from learner.step import train_step
from tests.groups import completion, grade, training_group
from tests.learner.plain import PlainPolicy

VOCAB, NOW = 12, Version(0, 3)
CONFIG = Config(groups_per_step=3, group_size=4, updates_per_step=1, sampling=SamplingConfig(max_tokens=8))
RESPONSES = ([[3, 7], [5], [2, 2, 9]], [[8], [1, 6]], [[4], [4, 4], [11, 0], [10]])
CORRECT = ((1.0, 0.0, 1.0), (0.0, 1.0), (1.0, 0.0, 0.0, 0.0))
RATIOS = ((1.2, 1.0, 1.0), (1.0, 1.25), (1.0, 1.0, 1.0, 1.0))
ROOT = math.sqrt(3) / 3  # of the mean 2/3 and the sample deviation sqrt(1/3)
ADVANTAGES = ((ROOT, -2 * ROOT, ROOT), (-math.sqrt(0.5), math.sqrt(0.5)), (1.5, -0.5, -0.5, -0.5))
NUM_THERE, NUM_LATE = 9, 3
LOSS = -(1.2 * ROOT - 2 * ROOT + ROOT - math.sqrt(0.5) + 1.25 * math.sqrt(0.5)) / NUM_THERE


def test_the_loss_is_the_mean_over_the_completions_that_are_there() -> None:
    metrics = train_step(uniform_policy(), groups(), CONFIG, NOW, Lineages())
    assert metrics["loss"] == pytest.approx(LOSS, rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(np.linalg.norm(gradient())), rel=1e-5)
    assert (metrics["num_completions"], metrics["num_late"], metrics["num_groups"]) == (NUM_THERE, NUM_LATE, 3)
    assert metrics["weight_mean"] == pytest.approx(9.45 / NUM_THERE)
    assert metrics["correct"] == pytest.approx(4 / NUM_THERE)


def test_whole_groups_have_no_late_completions() -> None:
    metrics = train_step(uniform_policy(), groups()[2:] * 3, CONFIG, NOW, Lineages())
    assert metrics["num_late"] == 0


def uniform_policy() -> PlainPolicy:
    """Each token is as likely as any other after each token."""
    table = nn.Embedding(VOCAB, VOCAB)
    nn.init.zeros_(table.weight)
    return PlainPolicy(table, lr=0.05)


def groups() -> tuple[wire.TrainingGroup, ...]:
    """Of 3, of 2 and of all 4 completions; the engine thought each less likely by its ratio than the learner does."""
    return tuple(
        training_group(
            [6],
            [
                completion(tokens, np.full(len(tokens), -math.log(VOCAB * ratio)), NOW, seed=i)
                for i, (tokens, ratio) in enumerate(zip(responses, ratios, strict=True))
            ],
            map(grade, correct),
            visit=visit,
        )
        for visit, (responses, correct, ratios) in enumerate(zip(RESPONSES, CORRECT, RATIOS, strict=True))
    )


def gradient() -> NDArray[np.float64]:
    """Of the loss at s = 1 with respect to the table: -(1/N) w A mean over tokens of (one-hot - 1/12)."""
    table = np.zeros((VOCAB, VOCAB))
    for responses, advantages, ratios in zip(RESPONSES, ADVANTAGES, RATIOS, strict=True):
        for tokens, advantage, ratio in zip(responses, advantages, ratios, strict=True):
            for before, token in zip([6, *tokens], tokens, strict=False):
                change = np.eye(VOCAB)[token] - 1 / VOCAB
                table[before] -= ratio * advantage / len(tokens) / NUM_THERE * change
    return table
