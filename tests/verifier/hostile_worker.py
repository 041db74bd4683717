"""A grading process whose rewards misbehave in every way that a reward can."""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

from common.wire import Grade, Outcome
from verifier import worker
from verifier.rewards import REWARDS

FINE = Grade(outcome=Outcome.CORRECT, correct=1.0, reward=1.0)


def hold(text: str, answer: str) -> Grade:
    """Says in `text`.begun that it has begun, and ends when there is a file `text`.go."""
    Path(f"{text}.begun").touch()
    while not Path(f"{text}.go").exists():
        time.sleep(0.005)
    return FINE


def meet(text: str, answer: str) -> Grade:
    """Notes its begin and its end in a file, and ends when two have begun."""
    path = Path(text)
    with path.open("a") as file:
        file.write("<")
    while path.read_text().count("<") < 2:
        time.sleep(0.005)
    with path.open("a") as file:
        file.write(">")
    return FINE


def backtrack(text: str, answer: str) -> Grade:
    """Stays in C, where no signal handler and no other thread of the process would get a turn."""
    Path(f"{text}.begun").touch()
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
    names = (hold, meet, backtrack, recurse, die, bomb, rubbish, raw_bytes, not_finite, chatty, whoami)
    worker.main({**REWARDS, **{reward.__name__: reward for reward in names}})
