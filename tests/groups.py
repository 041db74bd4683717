"""Scored groups as the learner is given them, for tests and benchmarks."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from common import wire
from common.versions import Version


def completion(
    token_ids: ArrayLike,
    logprobs: ArrayLike,
    spans: Iterable[wire.VersionSpan] | Version,
    *,
    seed: int = 0,
    reason: wire.FinishReason = wire.FinishReason.STOP,
) -> wire.Completion:
    """A completion whose tokens are of the versions of `spans`, or all of one version."""
    tokens = np.asarray(token_ids, np.int32)
    spans = [wire.VersionSpan(len(tokens), spans)] if isinstance(spans, Version) else list(spans)
    return wire.Completion(
        token_ids=wire.int_bytes(tokens),
        logprobs=wire.float_bytes(np.asarray(logprobs, np.float32)),
        versions=wire.span_bytes(spans),
        finish_reason=reason,
        seed=seed,
    )


def grade(correct: float | None) -> wire.Grade:
    """A grade whose reward is its correctness; None is one that timed out."""
    if correct is None:
        return wire.Grade(outcome=wire.Outcome.TIMEOUT, correct=0.0, reward=0.0)
    outcome = wire.Outcome.CORRECT if correct else wire.Outcome.WRONG
    return wire.Grade(outcome=outcome, correct=correct, reward=correct)


def training_group(
    prompt: ArrayLike,
    completions: Iterable[wire.Completion],
    grades: Iterable[wire.Grade],
    *,
    visit: int = 1,
    name: str = "set:1",
    answer: str = "7",
) -> wire.TrainingGroup:
    """A group of a prompt, given as token ids, with a grade for each completion."""
    asked = wire.Prompt(
        id=name, source="set", token_ids=wire.int_bytes(np.asarray(prompt, np.int32)), answer=answer, reward="exact"
    )
    group = wire.Group(
        key=wire.LeaseKey(visit, 1),
        generator="generator-0",
        prompt_id=asked.id,
        answer=asked.answer,
        reward=asked.reward,
        completions=tuple(completions),
        seconds=0.1,
    )
    scored = wire.ScoredGroup(group=group, grades=tuple(grades), verifier="verifier-0")
    return wire.TrainingGroup(prompt=asked, scored=scored)
