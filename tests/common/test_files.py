"""Files that take no more: a limit on their size stands for a full disk."""

import subprocess
import sys
import textwrap
from pathlib import Path

from common.files import Lines
from tests.clocks import PATIENCE_S


def limited(size_bytes: int, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process whose files may have so many bytes."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size_bytes}, -1))\n{textwrap.dedent(code)}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_a_line_that_finds_no_room_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    code = f"""
        from pathlib import Path
        from common.errors import exit_on_error
        from common.files import Lines
        lines = Lines(Path({str(path)!r}))
        lines.write("whole\\n")
        with exit_on_error():
            lines.write("too long\\n")
    """
    done = limited(10, code)
    assert done.returncode == 2
    assert done.stderr == f"sluice: {path}: cannot be written: File too large\n"
    assert path.read_text() == "whole\n"


def test_an_unfinished_line_is_cut_off_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "lines"
    Lines(path).write("one\nhalf")
    Lines(path).write("two\n")
    assert path.read_text() == "one\ntwo\n"


def test_metrics_that_find_no_room_for_tensorboard_are_an_error_and_no_wait(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from common.errors import exit_on_error
        from common.metrics import MetricsWriter
        metrics = MetricsWriter(Path({str(tmp_path)!r}))
        with exit_on_error():
            for step in range(20):
                metrics.write("step", step, **dict.fromkeys("abcdefghij", 1.0))
    """
    done = limited(3000, code)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"sluice: {tmp_path / 'tensorboard'}: cannot be written: File too large"), done.stderr


def test_an_error_that_cannot_be_told_keeps_its_exit_code() -> None:
    code = "from common.errors import StallError, exit_on_error\nwith exit_on_error(): raise StallError('no room')"
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", code], stderr=full, check=False).returncode == 3
