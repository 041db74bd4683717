"""The directory for weights on memory-backed storage: nothing stays there for longer than its launcher."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from common.errors import RunDirectoryError
from common.sections import WeightsConfig
from launch.plan import REPOSITORY
from launch.published import PublishedWeights, remove_abandoned

LAUNCHER = """
import sys, time
from pathlib import Path
from launch.published import PublishedWeights
weights = PublishedWeights.claim(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return WeightsConfig(dir=str(tmp_path)).of_run("a[b]c-0123456789")


@pytest.fixture
def launcher(path: Path) -> Generator[subprocess.Popen[str]]:
    """Another process, which claims `path` and lives on."""
    command = [sys.executable, "-c", LAUNCHER, str(path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


def test_a_run_has_a_directory_named_by_its_key(tmp_path: Path, path: Path) -> None:
    assert path == tmp_path / "sluice-abc01234"


def test_a_claimed_directory_is_there_until_the_run_ends(tmp_path: Path, path: Path) -> None:
    weights = PublishedWeights.claim(path)
    (path / "0.1").mkdir()
    remove_abandoned(tmp_path)
    assert (path / "0.1").is_dir()
    weights.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_launcher_left_is_removed_by_the_next(
    tmp_path: Path, path: Path, launcher: subprocess.Popen[str]
) -> None:
    (path / "0.1").mkdir()
    remove_abandoned(tmp_path)
    assert (path / "0.1").is_dir()
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_lock_or_another_name_stays(tmp_path: Path) -> None:
    (tmp_path / "sluice-learner0" / "0.1").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").touch()
    (tmp_path / "sluice-link0000").symlink_to(tmp_path / "elsewhere")
    remove_abandoned(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"sluice-learner0", "sluice-link0000", "elsewhere"}
    assert (tmp_path / "elsewhere" / "lock").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"weights\.dir: .*/none/sluice-x: cannot be written"):
        PublishedWeights.claim(tmp_path / "none" / "sluice-x")
