"""What the supervisor makes of ends: how long it waits, how often it tries again, and when the disk is to blame."""

import asyncio
import resource
import sys
from pathlib import Path

import pytest

from launch.plan import ProcessPlan
from launch.processes import ProcessError, Supervisor
from launch.run_directory import check_space

FOREVER = "import time; time.sleep(600)"


def supervise(run_dir: Path, code: str, **options: float) -> list[str]:
    """Runs a verifier with this code beside a learner that does not end; returns the notices and the error."""
    notices: list[str] = []
    plans = [
        ProcessPlan("verifier-0", "verifier", (sys.executable, "-c", code)),
        ProcessPlan("learner", "learner", (sys.executable, "-c", FOREVER)),
    ]

    async def body() -> None:
        supervisor = Supervisor(
            plans, run_dir, max_restarts=2, stop_timeout_s=5.0, back_off_s=0.05, notice=notices.append, **options
        )
        await supervisor.run(asyncio.Event())

    with pytest.raises(ProcessError) as error:
        asyncio.run(body())
    return [*notices, str(error.value)]


def test_a_process_that_lived_well_begins_anew_with_the_first_pause_and_all_its_restarts(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    code = f"""
import time
file = open({str(lives)!r}, "a+")
file.write("x")
file.flush()
if file.tell() == 2:
    time.sleep(1.5)
raise ValueError(file.tell())
"""
    pauses = [notice.partition("; ")[2] for notice in supervise(tmp_path, code, lived_well_s=1.5)]
    assert pauses == ["restart 1 of 2 in 0.05 s", "restart 1 of 2 in 0.05 s", "restart 2 of 2 in 0.1 s", ""]


def test_a_process_that_ends_on_a_full_disk_is_not_tried_again(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, old[1]))  # stands for a disk that takes no more
    try:
        told = supervise(tmp_path, "raise OSError")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert len(told) == 1
    assert told[0].startswith(f"run.dir: {tmp_path}: cannot be written: File too large (verifier-0 ended with ")


def test_looking_for_room_leaves_nothing(tmp_path: Path) -> None:
    check_space(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_process_that_stands_still_is_killed_with_its_supervisor_s_child(tmp_path: Path) -> None:
    stopped = "import os, signal; [os.kill(pid, signal.SIGSTOP) for pid in (os.getppid(), os.getpid())]"
    notices: list[str] = []

    async def body() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(1.5, stop.set)
        plans = [ProcessPlan("learner", "learner", (sys.executable, "-c", stopped))]
        await Supervisor(plans, tmp_path, max_restarts=0, stop_timeout_s=0.3, notice=notices.append).run(stop)

    asyncio.run(asyncio.wait_for(body(), 8))
    assert notices == ["learner did not stop within 0.3 s and is killed"]
