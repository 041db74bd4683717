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
    completions, grades = [], []
    for i in range(4):
        tokens = rng.integers(0, VOCAB, num_tokens or rng.integers(1, 9), dtype=np.int32)
        logprobs = np.full(len(tokens), -2.0, np.float32)
        spans = [wire.VersionSpan(len(tokens), Version(0, visit % 3))]
        completions.append(
            wire.Completion(
                token_ids=wire.int_bytes(tokens),
                logprobs=wire.float_bytes(logprobs),
                versions=wire.span_bytes(spans),
                finish_reason=wire.FinishReason.STOP,
                seed=i,
            )
        )
        right = float(tokens[-1] % 2 == 0)
        outcome = wire.Outcome.CORRECT if right else wire.Outcome.WRONG
        grades.append(wire.Grade(outcome=outcome, correct=right, reward=right))
    prompt = wire.Prompt(id="set:1", source="set", token_ids=wire.int_bytes([4, 5]), answer="7", reward="exact")
    made = wire.Group(
        key=wire.LeaseKey(visit, 1),
        generator="generator-0",
        prompt_id=prompt.id,
        answer=prompt.answer,
        reward=prompt.reward,
        completions=tuple(completions),
        seconds=0.1,
    )
    return wire.TrainingGroup(
        prompt=prompt, scored=wire.ScoredGroup(group=made, grades=tuple(grades), verifier="verifier-0")
    )


def step(config: Config = CONFIG, batch: tuple[wire.TrainingGroup, ...] | None = None) -> dict[str, float]:
    return train_step(policy(), batch or groups(), config, Version(0, 2), Lineages())
