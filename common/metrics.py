"""The run's numbers: `metrics.jsonl`, one JSON object a row, and TensorBoard events."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.files import Lines, one_line

METRICS = "metrics.jsonl"
COMPLETE, STOPPED = "all steps are done", "stopped on request"  # why a run ended by itself


class MetricsWriter:
    """Appends rows to `RUN/metrics.jsonl` and scalars to `RUN/tensorboard`. The learner's first rank owns it."""

    def __init__(self, run_dir: Path) -> None:
        self._file = Lines(run_dir / METRICS)
        self._events = _Events(run_dir / "tensorboard")

    def write(self, kind: str, step: int, **values: float | int | str | Mapping[str, float] | None) -> None:
        """Writes a row {kind, step, time, **values}; numbers become scalars `kind/name` (a set's name before it).

        Raises:
            RunDirectoryError: The disk is full.
        """
        now = time.time()
        row = {"kind": kind, "step": step, "time": now, **values}
        self._file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
        prefix = f"{kind}/{values['source']}" if "source" in values else kind
        scalars = {
            f"{prefix}/{name}": value
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._events.write(scalars, step, now)

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._events.close()


class _Events:
    """TensorBoard's events, written by whoever calls: tensorboardX's own thread dies on a full disk without a word.

    Its queue then fills, and the next scalar waits for ever.
    """

    def __init__(self, directory: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._directory = directory
        self._messages: Any = event_pb2  # its classes are made at run time: no checker knows them
        with one_line(self._directory):
            directory.mkdir(exist_ok=True)
            self._writer: Any = EventsWriter(str(directory / "events"))

    def write(self, scalars: Mapping[str, float], step: int, wall_time: float) -> None:
        """Writes the scalars of a step and flushes them."""
        from tensorboardX.summary import scalar

        with one_line(self._directory):
            for name, value in scalars.items():
                event = self._messages.Event(summary=scalar(name, value), step=step, wall_time=wall_time)
                self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """Flushes the file."""
        with one_line(self._directory):
            self._writer.close()


def read_metrics(run_dir: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole rows from byte `offset` on, each with the offset after it; an unfinished last line is left."""
    yield from read_rows(run_dir / METRICS, offset)


def read_rows(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The same of any file of JSON lines; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
