"""A step on a policy of pairs of tokens: the configuration, the policy and the groups."""

import numpy as np
import torch
from torch import nn

from common import wire
from common.config import Config
from common.learning import LossConfig
from common.sections import SamplingConfig
from common.versions import Lineages, Version
from learner.step import train_step
from tests.groups import completion, grade, training_group
from tests.learner.plain import PlainPolicy

VOCAB = 12
CONFIG = Config(
    groups_per_step=8,
    group_size=4,
    updates_per_step=4,
    sampling=SamplingConfig(max_tokens=8),
    loss=LossConfig(clip_low=3e-3, clip_high=4e-3),
)


def policy(seed: int = 0) -> PlainPolicy:
    torch.manual_seed(seed)
    pairs = nn.Embedding(VOCAB, VOCAB)
    return PlainPolicy(pairs, lr=0.05)


def groups(num: int = 8, *, num_tokens: int | None = None) -> tuple[wire.TrainingGroup, ...]:
    """Completions of 1 to 8 tokens, sampled under version 0, right where their last token is even."""
    rng = np.random.default_rng(0)
    return tuple(group(rng, visit, num_tokens) for visit in range(num))


def group(rng: np.random.Generator, visit: int, num_tokens: int | None) -> wire.TrainingGroup:
    completions: list[wire.Completion] = []
    grades: list[wire.Grade] = []
    for i in range(4):
        tokens = rng.integers(0, VOCAB, num_tokens or rng.integers(1, 9), dtype=np.int32)
        completions.append(completion(tokens, np.full(len(tokens), -2.0), Version(0, visit % 3), seed=i))
        grades.append(grade(float(tokens[-1] % 2 == 0)))
    return training_group([4, 5], completions, grades, visit=visit)


def step(config: Config = CONFIG, batch: tuple[wire.TrainingGroup, ...] | None = None) -> dict[str, float]:
    return train_step(policy(), batch or groups(), config, Version(0, 2), Lineages())
