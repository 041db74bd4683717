"""A disk that is full in the middle of a run."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.accounts import Cost, cost
from tests.system.conftest import Run

pytestmark = [pytest.mark.full, pytest.mark.faults]

SIZE_MIB = 48
SHORT = (
    "steps=8",
    "groups_per_step=8",
    "learner.checkpoint_every=2",
    "evaluation.every=8",
    "run.stop_timeout_s=10",
    "run.resume=auto",
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of a few MiB."""
    if os.geteuid() != 0:
        pytest.skip("a file system can be mounted by root alone")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_with_room_it_goes_on(
    start_run: Callable[..., Run], small_disk: Path, report: Callable[[str, str, Cost], None]
) -> None:
    run = start_run(*SHORT, name="disk/run")
    run.wait_for_step(3)
    filler = small_disk / "filler"
    _fill(filler)
    assert run.wait() == 2
    last = run.output().splitlines()[-1]
    assert last.startswith("sluice: "), last
    assert str(run.directory) in last
    assert "Traceback" not in run.output()
    assert "; restart " not in run.output()
    run.assert_nothing_is_left()
    assert cost(run.directory).num_lost == 0
    filler.unlink()
    assert run.audit().returncode == 0, run.audit().stdout
    _assert_whole(run.directory)

    resumed = start_run(*SHORT, name="disk/run")
    assert resumed.wait() == 0
    resumed.assert_survived(0.0)
    report(
        "the disk of the run directory is full",
        "one line that names the file, exit code 2; with room the same command goes on",
        cost(resumed.directory),
    )


def _fill(path: Path) -> None:
    """Leaves not a byte."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def _assert_whole(run_dir: Path) -> None:
    """No line and no checkpoint is half written."""
    for path in [*run_dir.glob("*.jsonl"), *run_dir.glob("logs/*.jsonl")]:
        assert path.read_bytes()[-1:] in (b"", b"\n"), path
    for checkpoint in (run_dir / "checkpoints").glob("step-*"):
        assert (checkpoint / "version.json").stat().st_size > 0
