"""A grading process whose rewards misbehave in every way that a reward can."""

import os
import re
import signal
import time
from contextlib import suppress

from common.wire import Grade, Outcome
from verifier import worker
from verifier.rewards import REWARDS

FINE = Grade(outcome=Outcome.CORRECT, correct=1.0, reward=1.0)


def sleep(text: str, answer: str) -> Grade:
    time.sleep(float(text))
    return FINE


def backtrack(text: str, answer: str) -> Grade:
    """Stays in C, where no signal handler and no other thread of the process would get a turn."""
    re.fullmatch(r"(a|aa)+", "a" * 100 + "b")
    return FINE


def recurse(text: str, answer: str) -> Grade:
    return recurse(text + "x", answer)


def die(text: str, answer: str) -> Grade:
    os.kill(os.getpid(), signal.SIGKILL)
    return FINE


def bomb(text: str, answer: str) -> Grade:
    return Grade(outcome=Outcome.CORRECT, correct=float(len(bytearray(1 << 40))), reward=1.0)


def rubbish(text: str, answer: str) -> Grade:
    return "rubbish"  # type: ignore[return-value]


def raw_bytes(text: str, answer: str) -> Grade:
    for number in range(3, 16):
        with suppress(OSError):
            os.write(number, b"\xff" * 64)
    return FINE


def not_finite(text: str, answer: str) -> Grade:
    return Grade(outcome=Outcome.CORRECT, correct=float("nan"), reward=1.0)


def chatty(text: str, answer: str) -> Grade:
    print(text * 10_000, flush=True)  # noqa: T201
    return FINE


def whoami(text: str, answer: str) -> Grade:
    return Grade(outcome=Outcome.CORRECT, correct=1.0, reward=1.0, extracted=str(os.getpid()))


if __name__ == "__main__":
    names = (sleep, backtrack, recurse, die, bomb, rubbish, raw_bytes, not_finite, chatty, whoami)
    worker.main({**REWARDS, **{reward.__name__: reward for reward in names}})
