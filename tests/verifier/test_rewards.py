"""Grades of whole responses."""

import pytest

from common.rewards import DEFAULT_REWARD, REWARDS as NAMES
from common.wire import Outcome
from verifier.rewards import REWARDS


def test_every_reward_that_the_configuration_knows_exists() -> None:
    assert tuple(REWARDS) == NAMES
    assert DEFAULT_REWARD in REWARDS


@pytest.mark.parametrize(
    ("reward", "text", "answer", "outcome"),
    [
        ("math", "so \\boxed{0.5}", "1/2", Outcome.CORRECT),
        ("math", "so \\boxed{0.51}", "1/2", Outcome.WRONG),
        ("math", "0.5", "1 - x\n#### 1/2", Outcome.CORRECT),
        ("math", "<think> \\boxed{1/2}", "1/2", Outcome.WRONG),
        ("math", "\\boxed{1/2} \\boxed{", "1/2", Outcome.WRONG),
        ("math", "I would say that this is a hard question, and rather leave it.\n", "1/2", Outcome.WRONG),
        ("math", "I do not know.\nSorry.", "1/2", Outcome.UNPARSABLE),
        ("exact", "12", "12", Outcome.CORRECT),
        ("exact", " 12\n", "12", Outcome.CORRECT),
        ("exact", "12.0", "12", Outcome.WRONG),
        ("exact", "<think>9</think>12", "12", Outcome.CORRECT),
        ("exact", "<think>12", "12", Outcome.WRONG),
        ("exact", "#### 12", "12", Outcome.CORRECT),
        ("exact", "a\nb", "a\nb", Outcome.CORRECT),
        ("exact", "\\boxed{}", "", Outcome.WRONG),
    ],
)
def test_a_response_gets_the_outcome_that_it_earns(reward: str, text: str, answer: str, outcome: Outcome) -> None:
    grade = REWARDS[reward](text, answer)
    assert grade.outcome is outcome
    assert grade.correct == grade.reward == (1.0 if outcome is Outcome.CORRECT else 0.0)


def test_what_was_extracted_is_shown_but_not_at_any_length() -> None:
    assert REWARDS["math"]("\\boxed{41}", "42").extracted == "41"
    assert len(REWARDS["math"]("\\boxed{" + "4" * 1_000_000 + "}", "42").extracted) == 200
