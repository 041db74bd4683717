"""Grading processes that hang, die, eat memory and talk nonsense."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from common.errors import ConfigError, SluiceError
from common.sections import VerifierConfig
from common.wire import Grade, Outcome
from tests.clocks import comes_about, move_time, pass_time, run_by_hand, settle, wait_until
from tests.leaks import living
from verifier.sandbox import GRACE_S, Sandbox
from verifier.tasks import Task

HOSTILE = (sys.executable, str(Path(__file__).with_name("hostile_worker.py")))
DEADLINE_S = 60.0  # by a clock that stands still until a test moves it
T = TypeVar("T")


def _in_sandbox(body: Callable[[Sandbox], Awaitable[T]], **values: Any) -> T:
    async def run() -> T:
        async with Sandbox(VerifierConfig(deadline_s=DEADLINE_S, **values), command=HOSTILE) as sandbox:
            return await body(sandbox)

    return run_by_hand(run())


def _held(path: Path) -> Task:
    """It begins, which `_begun` waits for, and does not end before `_go`."""
    return Task("hold", "", str(path))


async def _begun(path: Path) -> None:
    await comes_about(path.with_name(f"{path.name}.begun").exists, f"{path.name} to begin")


def _go(path: Path) -> None:
    path.with_name(f"{path.name}.go").touch()


async def _pass_deadline() -> None:
    await pass_time(DEADLINE_S)
    await pass_time(GRACE_S)


def _outcomes(grades: tuple[Grade, ...]) -> list[Outcome]:
    return [grade.outcome for grade in grades]


def _workers() -> list[psutil.Process]:
    """Not every child is one: other tests leave children in this process."""
    return [child for child in living(psutil.Process().children()) if HOSTILE[1] in child.cmdline()]


def test_a_grade_that_hangs_is_killed_and_is_a_timeout_while_its_neighbours_are_graded(tmp_path: Path) -> None:
    hanging = tmp_path / "hanging"

    async def body(sandbox: Sandbox) -> tuple[tuple[Grade, ...], dict[Outcome, int]]:
        tasks = [Task("math", "42", "42"), _held(hanging), Task("math", "42", "41"), Task("math", "42", "42")]
        grading = asyncio.create_task(sandbox.grade(tasks))
        await _begun(hanging)
        await _pass_deadline()
        return await grading, sandbox.num_failures

    grades, num_failures = _in_sandbox(body)
    assert _outcomes(grades) == [Outcome.CORRECT, Outcome.TIMEOUT, Outcome.WRONG, Outcome.CORRECT]
    assert num_failures == {Outcome.TIMEOUT: 1, Outcome.ERROR: 0}


def test_the_deadline_is_of_each_grade_and_not_of_the_group(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(5)]

    async def body(sandbox: Sandbox) -> tuple[Grade, ...]:
        grading = asyncio.create_task(sandbox.grade([_held(path) for path in paths]))
        for path in paths:
            await _begun(path)
            await pass_time(0.6 * DEADLINE_S)
            _go(path)
        return await grading

    assert _outcomes(_in_sandbox(body)) == [Outcome.CORRECT] * 5


def test_a_grade_that_holds_the_interpreter_is_killed_too(tmp_path: Path) -> None:
    async def body(sandbox: Sandbox) -> tuple[Grade, ...]:
        grading = asyncio.create_task(sandbox.grade([Task("backtrack", "", str(tmp_path / "one"))]))
        await _begun(tmp_path / "one")
        await _pass_deadline()
        return await grading

    assert _outcomes(_in_sandbox(body)) == [Outcome.TIMEOUT]


@pytest.mark.parametrize("reward", ["die", "bomb", "rubbish", "raw_bytes", "not_finite", "recurse", "unknown"])
def test_a_worker_that_dies_or_answers_rubbish_is_an_error_and_replaced(reward: str) -> None:
    async def body(sandbox: Sandbox) -> tuple[tuple[Grade, ...], int]:
        grades = await sandbox.grade([Task("math", "1", "1"), Task(reward, "", ""), Task("math", "1", "1")])
        return grades, sandbox.num_replaced

    grades, num_replaced = _in_sandbox(body, memory_bytes=1 << 29)
    assert _outcomes(grades) == [Outcome.CORRECT, Outcome.ERROR, Outcome.CORRECT]
    assert [grade.reward for grade in grades] == [1.0, 0.0, 1.0]
    assert num_replaced == 1


def test_a_worker_killed_in_the_middle_of_a_grade_is_an_error(tmp_path: Path) -> None:
    async def body(sandbox: Sandbox) -> tuple[Grade, ...]:
        grading = asyncio.create_task(sandbox.grade([_held(tmp_path / "one"), Task("math", "1", "1")]))
        await _begun(tmp_path / "one")
        _workers()[0].kill()
        return await grading

    assert _outcomes(_in_sandbox(body)) == [Outcome.ERROR, Outcome.CORRECT]


def test_a_worker_that_died_while_it_had_nothing_to_do_costs_no_grade() -> None:
    async def body(sandbox: Sandbox) -> tuple[Grade, ...]:
        (worker,) = sandbox._workers
        _workers()[0].kill()
        await comes_about(lambda: worker.is_gone, "the sandbox to hear of it")
        return await sandbox.grade([Task("math", "1", "1")])

    assert _outcomes(_in_sandbox(body, num_workers=1)) == [Outcome.CORRECT]


def test_what_a_reward_prints_does_not_reach_the_grades() -> None:
    grades = _in_sandbox(lambda sandbox: sandbox.grade([Task("chatty", "", "x"), Task("math", "1", "1")]))
    assert _outcomes(grades) == [Outcome.CORRECT, Outcome.CORRECT]


def test_a_worker_is_replaced_after_max_items() -> None:
    async def body(sandbox: Sandbox) -> list[str]:
        groups = [await sandbox.grade([Task("whoami", "", "")] * 2) for _ in range(4)]
        return [grade.extracted for group in groups for grade in group]

    pids = _in_sandbox(body, max_items=4)
    assert pids[:4] == [pids[0]] * 4
    assert pids[4:] == [pids[4]] * 4
    assert pids[0] != pids[4]


def test_groups_are_graded_at_the_same_time_by_as_many_workers_as_there_are(tmp_path: Path) -> None:
    """Each waits until another has begun; how many are between begin and end is never more than the workers."""
    notes = tmp_path / "notes"

    async def body(sandbox: Sandbox) -> list[tuple[Grade, ...]]:
        return await asyncio.gather(*(sandbox.grade([Task("meet", "", str(notes))]) for _ in range(4)))

    assert [_outcomes(grades) for grades in _in_sandbox(body, num_workers=2)] == [[Outcome.CORRECT]] * 4
    num_at_work = list(accumulate(1 if note == "<" else -1 for note in notes.read_text()))
    assert (len(num_at_work), max(num_at_work)) == (8, 2)


def test_a_large_group_of_long_texts_passes_through_the_pipe() -> None:
    text = "no " * 100_000 + "\\boxed{42}"
    grades = _in_sandbox(lambda sandbox: sandbox.grade([Task("math", "42", text)] * 16))
    assert _outcomes(grades) == [Outcome.CORRECT] * 16


def test_what_a_cancelled_group_leaves_behind_is_not_taken_for_the_next_groups_grades(tmp_path: Path) -> None:
    async def body(sandbox: Sandbox) -> tuple[Grade, ...]:
        cancelled = asyncio.create_task(sandbox.grade([_held(tmp_path / "one")] * 3))
        await _begun(tmp_path / "one")
        cancelled.cancel()
        await asyncio.wait([cancelled])
        _go(tmp_path / "one")
        return await sandbox.grade([Task("math", "1", "2")])

    assert _outcomes(_in_sandbox(body, num_workers=1)) == [Outcome.WRONG]


def test_no_worker_is_left_when_the_sandbox_ends_in_the_middle_of_a_grade(tmp_path: Path) -> None:
    async def body(sandbox: Sandbox) -> list[psutil.Process]:
        grading = asyncio.create_task(sandbox.grade([_held(tmp_path / "one")]))
        await _begun(tmp_path / "one")
        workers = _workers()
        grading.cancel()
        return workers

    workers = _in_sandbox(body, num_workers=2)
    assert len(workers) == 2
    assert not living(workers)


def test_an_answer_that_came_while_the_event_loop_stood_still_is_no_timeout(tmp_path: Path) -> None:
    """The second task is begun when the first one's grade is written: then the deadline has passed, unread."""
    first, second = tmp_path / "first", tmp_path / "second"

    async def body(sandbox: Sandbox) -> tuple[Grade, ...]:
        grading = asyncio.create_task(sandbox.grade([_held(first), _held(second)]))
        await _begun(first)
        await settle()
        _go(first)
        wait_until(Path(f"{second}.begun").exists, "the second task to begin")
        move_time(DEADLINE_S)
        await settle()
        _go(second)
        return await grading

    assert _outcomes(_in_sandbox(body)) == [Outcome.CORRECT] * 2


def test_a_worker_is_limited_in_memory_files_and_core_dumps() -> None:
    async def body(sandbox: Sandbox) -> list[tuple[int, int]]:
        worker = _workers()[0]
        return [worker.rlimit(kind) for kind in (psutil.RLIMIT_AS, psutil.RLIMIT_NOFILE, psutil.RLIMIT_CORE)]

    assert _in_sandbox(body, memory_bytes=1 << 30) == [(1 << 30, 1 << 30), (64, 64), (0, 0)]


def test_ctrl_c_is_left_to_the_verifier() -> None:
    async def body(sandbox: Sandbox) -> tuple[Grade, ...]:
        os.kill(_workers()[0].pid, signal.SIGINT)
        return await sandbox.grade([Task("math", "1", "1")])

    assert _outcomes(_in_sandbox(body)) == [Outcome.CORRECT]


def test_too_little_memory_is_an_error_that_names_the_key() -> None:
    async def body(sandbox: Sandbox) -> None:
        pytest.fail("started")

    with pytest.raises(ConfigError, match=r"verifier\.memory_bytes: found 67108864, expected at least \d+"):
        _in_sandbox(body, memory_bytes=1 << 26)


def test_a_command_that_is_no_worker_is_an_error() -> None:
    async def run() -> None:
        async with Sandbox(VerifierConfig(), command=(sys.executable, "-c", "pass")):
            pytest.fail("started")

    with pytest.raises(SluiceError, match="expected it to be ready"):
        asyncio.run(run())
