"""metrics.jsonl, files that are whole or absent, and busy time."""

import json
from pathlib import Path

import pytest

from common import wire
from common.errors import RunDirectoryError
from common.files import write_atomically
from common.membership import Activity
from common.metrics import METRICS, MetricsWriter, read_metrics
from tests.clocks import ManualClock


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
    clock = ManualClock(100.0)
    activity = Activity(clock)
    clock.now = 101.0
    with activity.working():
        clock.now = 102.0
        with activity.working():
            clock.now = 104.0
        clock.now = 107.0
        assert activity.take().busy == (wire.Span(101.0, 107.0),)
        clock.now = 111.0
    clock.now = 120.0
    activity.count(num_tokens=3, num_items=1)
    later = activity.take()
    assert (later.interval, later.busy) == (wire.Span(107.0, 120.0), (wire.Span(107.0, 111.0),))
    assert (later.num_tokens, later.num_items) == (3, 1)
    assert activity.take().busy == ()
