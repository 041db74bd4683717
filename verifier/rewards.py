"""Rewards by name: from a response and a reference answer to a grade."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from common.wire import Grade, Outcome
from verifier.answers import answer_in, reference_in, without_thoughts
from verifier.equivalence import equivalent

Reward = Callable[[str, str], Grade]

_MAX_SHOWN: Final = 200


def exact(text: str, answer: str) -> Grade:
    """Correct where the response after its thoughts, or the answer found in it, is the reference to the letter."""
    said, found, expected = without_thoughts(text), answer_in(text), answer.strip()
    return _grade(found, bool(expected) and expected in ((said or "").strip(), found))


def math(text: str, answer: str) -> Grade:
    """Correct where the answer found in the response is mathematically equal to the reference answer."""
    found = answer_in(text)
    return _grade(found, found is not None and equivalent(found, reference_in(answer)))


def _grade(found: str | None, correct: bool) -> Grade:
    if correct:
        return Grade(outcome=Outcome.CORRECT, correct=1.0, reward=1.0, extracted=(found or "")[:_MAX_SHOWN])
    outcome = Outcome.UNPARSABLE if found is None else Outcome.WRONG
    return Grade(outcome=outcome, correct=0.0, reward=0.0, extracted=(found or "")[:_MAX_SHOWN])


REWARDS: Final[Mapping[str, Reward]] = MappingProxyType({"exact": exact, "math": math})
