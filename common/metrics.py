"""The run's numbers: `metrics.jsonl`, one JSON object a row, and TensorBoard events."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.files import append_lines

METRICS = "metrics.jsonl"
COMPLETE, STOPPED = "all steps are done", "stopped on request"  # why a run ended by itself


class MetricsWriter:
    """Appends rows to `RUN/metrics.jsonl` and scalars to `RUN/tensorboard`. The learner's first rank owns it."""

    def __init__(self, run_dir: Path) -> None:
        from tensorboardX import SummaryWriter

        self._file = append_lines(run_dir / METRICS)
        self._events = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, kind: str, step: int, **values: float | int | str | Mapping[str, float] | None) -> None:
        """Writes a row {kind, step, time, **values}; numbers become scalars `kind/name` (a set's name before it)."""
        row = {"kind": kind, "step": step, "time": time.time(), **values}
        self._file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
        prefix = f"{kind}/{values['source']}" if "source" in values else kind
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._events.add_scalar(f"{prefix}/{name}", value, step)
        self._events.flush()

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._events.close()


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
