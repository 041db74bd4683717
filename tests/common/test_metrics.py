"""metrics.jsonl, files that are whole or absent, and busy time."""

import json
import time
from pathlib import Path

import pytest

from common.errors import RunDirectoryError
from common.files import write_atomically
from common.membership import Activity
from common.metrics import METRICS, MetricsWriter, read_metrics


def test_rows_are_read_as_they_are_written_and_half_a_row_waits(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write("step", 1, reward=0.5, loss=float("nan"))
    rows = list(read_metrics(tmp_path))
    assert [(row["kind"], row["step"], row["reward"], row["loss"]) for row, _ in rows] == [("step", 1, 0.5, None)]
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "st')
    assert list(read_metrics(tmp_path, rows[-1][1])) == []
    with (tmp_path / METRICS).open("a") as file:
        file.write('ep", "step": 2}\n')
    assert [row["step"] for row, _ in read_metrics(tmp_path, rows[-1][1])] == [2]
    writer.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_what_a_killed_process_left_of_a_row_is_cut_off_before_the_next(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    writer = MetricsWriter(tmp_path)
    writer.write("step", 2)
    assert [row["step"] for row, _ in read_metrics(tmp_path)] == [1, 2]
    writer.close()


def test_each_line_is_strict_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write("step", 1, a=float("inf"), b=float("nan"), c=1.5)
    line = (tmp_path / METRICS).read_text()
    assert json.loads(line, parse_constant=pytest.fail)["c"] == 1.5
    writer.close()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file"
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        write_atomically(path, b"new")
    assert not path.parent.exists()
    write_atomically(tmp_path / "file", b"old")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_busy_time_is_the_union_of_overlapping_work() -> None:
    activity = Activity()
    with activity.working():
        with activity.working():
            time.sleep(0.05)
        time.sleep(0.05)
        stats = activity.take()
        assert len(stats.busy) == 1
        time.sleep(0.05)
    activity.count(num_tokens=3, num_items=1)
    later = activity.take()
    busy_s = sum(span.end - span.start for span in (*stats.busy, *later.busy))
    assert 0.14 < busy_s < 0.5
    assert (later.num_tokens, later.num_items) == (3, 1)
    assert activity.take().busy == ()
