"""A grading process: `python -m verifier.worker MEMORY_BYTES DEADLINE_S`, tasks on stdin, grades on stdout.

It reads one frame with a list of tasks and writes one frame a grade, in order, until stdin ends. It may be killed at
any moment and catches nothing: a reward that raises ends it, and whoever started it sees that.

What this does not do: it limits memory, files and time, but keeps no code from the network or the file system. Rewards
read completions as text and must never run them.
"""

import argparse
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

from common.process import die_with_parent
from verifier.rewards import REWARDS, Reward
from verifier.tasks import HEAD_BYTES, Ready, Task, frame

MAX_FILES = 64
_PAGE_BYTES = resource.getpagesize()


def main(rewards: Mapping[str, Reward] = REWARDS) -> None:
    """Grades what stdin says until it ends."""
    parser = argparse.ArgumentParser(prog="python -m verifier.worker", description=__doc__)
    parser.add_argument("memory_bytes", type=int, help="limit of the address space")
    parser.add_argument("deadline_s", type=float, help="of one grade")
    arguments = parser.parse_args()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the verifier, which then ends this process
    tasks, grades = _take_pipes()
    grades.write(frame(Ready(_limit(arguments.memory_bytes))))
    decoder = msgspec.msgpack.Decoder(list[Task])
    while head := tasks.read(HEAD_BYTES):
        for task in decoder.decode(tasks.read(int.from_bytes(head, "little"))):
            _limit_cpu(arguments.deadline_s)
            grades.write(frame(rewards[task.reward](task.text, task.answer)))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes, for frames only: whatever else reads finds nothing, and whatever prints does so on stderr."""
    tasks, grades = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(sys.stderr.fileno(), 1)
    os.close(nothing)
    return tasks, grades


def _limit(memory_bytes: int) -> int:
    """Sets the limits that hold for the whole life; returns the address space in use.

    A limit below that would end the process without a word, and is left to the verifier to refuse.
    """
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE_BYTES
    if memory_bytes > in_use:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return in_use


def _limit_cpu(deadline_s: float) -> None:
    """Ends the process should the next grade outlive its deadline, and the verifier not see to it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + deadline_s) + 1, hard))


if __name__ == "__main__":
    main()
