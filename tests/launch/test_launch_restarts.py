"""What the supervisor makes of ends: how long it waits, how often it tries again, and when the disk is to blame."""

import asyncio
import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import processes
from launch.plan import ProcessPlan
from launch.processes import ProcessError, Supervisor
from launch.run_directory import check_space
from tests.clocks import PATIENCE_S, comes_about

FOREVER = "import time; time.sleep(600)"


def supervise(run_dir: Path, code: str, **options: Any) -> list[str]:
    """Runs a verifier with this code beside a learner that does not end; returns the notices and the error."""
    notices: list[str] = []
    plans = [
        ProcessPlan("verifier-0", "verifier", (sys.executable, "-c", code)),
        ProcessPlan("learner", "learner", (sys.executable, "-c", FOREVER)),
    ]

    async def body() -> None:
        supervisor = Supervisor(
            plans, run_dir, max_restarts=2, stop_timeout_s=PATIENCE_S, back_off_s=0.05, notice=notices.append, **options
        )
        await supervisor.run(asyncio.Event())

    with pytest.raises(ProcessError) as error:
        asyncio.run(body())
    return [*notices, str(error.value)]


def test_a_process_that_lived_well_begins_anew_with_the_first_pause_and_all_its_restarts(tmp_path: Path) -> None:
    """Of four lives the second lasts ten minutes by the supervisor's clock."""
    lives = tmp_path / "lives"
    lives.touch()
    code = f"""
file = open({str(lives)!r}, "a")
file.write("x")
raise ValueError
"""
    told = supervise(tmp_path, code, clock=lambda: 600.0 if lives.stat().st_size >= 2 else 0.0)
    pauses = [notice.partition("; ")[2] for notice in told]
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


def test_a_process_that_stands_still_is_killed_with_its_supervisor_s_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_KILL_TIMEOUT_S", PATIENCE_S)
    pids = tmp_path / "pids"
    stopped = f"""
import os, signal
pids = os.getppid(), os.getpid()
open({str(pids)!r}, "w").write(" ".join(map(str, pids)))
[os.kill(pid, signal.SIGSTOP) for pid in pids]
"""
    notices: list[str] = []

    def stand_still() -> bool:
        found = pids.read_text().split() if pids.exists() else []
        return len(found) == 2 and all(psutil.Process(int(pid)).status() == psutil.STATUS_STOPPED for pid in found)

    async def body() -> None:
        stop = asyncio.Event()
        plans = [ProcessPlan("learner", "learner", (sys.executable, "-c", stopped))]
        supervisor = Supervisor(plans, tmp_path, max_restarts=0, stop_timeout_s=0.3, notice=notices.append)
        running = asyncio.create_task(supervisor.run(stop))
        await comes_about(stand_still, "both to stand still")
        stop.set()
        await running

    asyncio.run(body())
    assert notices == ["learner did not stop within 0.3 s and is killed"]
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split())
