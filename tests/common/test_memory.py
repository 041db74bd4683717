"""Directories on memory-backed storage: none is there for longer than its process."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from common.errors import RunDirectoryError
from common.memory import MemoryDirectory, remove_abandoned
from launch.plan import REPOSITORY

OWNER = """
import sys, time
from pathlib import Path
from common.memory import MemoryDirectory
directory = MemoryDirectory.make(Path(sys.argv[1]), "learner-0")
(directory.path / "0.1").mkdir()
print(directory.path, flush=True)
time.sleep(6000)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Generator[tuple["subprocess.Popen[str]", Path]]:
    """Another process, which makes a directory and lives on."""
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_directory_is_there_until_its_process_removes_it(tmp_path: Path) -> None:
    with MemoryDirectory.make(tmp_path, "generator-0") as directory:
        (directory.path / "pulled").mkdir()
        assert directory.path.name.startswith("sluice-generator-0-")
        assert directory.path.stat().st_mode & 0o777 == 0o700
        remove_abandoned(tmp_path)
        with MemoryDirectory.make(tmp_path, "generator-0") as other:
            assert other.path != directory.path
            assert (directory.path / "pulled").is_dir()
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_by_the_next_that_makes_one(
    tmp_path: Path, owner: tuple["subprocess.Popen[str]", Path]
) -> None:
    process, path = owner
    remove_abandoned(tmp_path)
    assert (path / "0.1").is_dir()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with MemoryDirectory.make(tmp_path, "generator-0") as directory:
        assert names(tmp_path) == [directory.path.name, f"{directory.path.name}.lock"]


def test_a_process_that_is_killed_before_its_directory_is_there_leaves_a_lock_that_goes(tmp_path: Path) -> None:
    (tmp_path / "sluice-learner-0-abcdefgh.lock").touch()
    remove_abandoned(tmp_path)
    assert names(tmp_path) == []


def test_what_has_no_lock_or_another_name_or_is_a_link_stays(tmp_path: Path) -> None:
    (tmp_path / "sluice-learner-0" / "0.1").mkdir(parents=True)
    (tmp_path / "elsewhere.lock").touch()
    (tmp_path / "sluice-link.lock").symlink_to(tmp_path / "elsewhere.lock")
    remove_abandoned(tmp_path)
    assert names(tmp_path) == ["elsewhere.lock", "sluice-learner-0", "sluice-link.lock"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"weights\.dir: .*/none: cannot be written: No such file"):
        MemoryDirectory.make(tmp_path / "none", "learner-0")
