"""How far a run is, from the rows of its metrics and its learner's log as they come."""

from pathlib import Path
from typing import Any

from common.log import AFRESH, DAMAGED, KERNELS, LEARNER
from common.metrics import read_metrics, read_rows

Row = dict[str, Any]
FOR_PEOPLE = (KERNELS, DAMAGED, AFRESH)
_RECENT = 20


class Progress:
    """The newest rows of a run.

    Attributes:
        num_steps: Of the whole run.
        newest: The newest step's row; empty before the first.
        accuracy: Newest held-out accuracy of each source.
    """

    def __init__(self, run_dir: Path, num_steps: int) -> None:
        self.num_steps = num_steps
        self.newest: Row = {}
        self.accuracy: dict[str, float] = {}
        self._run_dir = run_dir
        self._offset = self._log_offset = 0
        self._seconds: list[float] = []

    def read(self) -> list[Row]:
        """The rows that are new, those of the learner's log that are for people before the others."""
        rows = self._read_log()
        for row, offset in read_metrics(self._run_dir, self._offset):
            self._offset = offset
            rows.append(row)
            if row["kind"] == "step":
                self.newest = row
                self._seconds = [*self._seconds, number(row, "seconds")][-_RECENT:]
            elif row["kind"] == "evaluation":
                self.accuracy[str(row["source"])] = number(row, "accuracy")
        return rows

    def _read_log(self) -> list[Row]:
        rows: list[Row] = []
        for event, offset in read_rows(self._run_dir / "logs" / f"{LEARNER}.jsonl", self._log_offset):
            self._log_offset = offset
            if event["event"] in FOR_PEOPLE:
                rows.append({**event, "kind": event["event"]})
        return rows

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.newest.get("step", 0))

    @property
    def seconds_left(self) -> float:
        """At the pace of the recent steps; NaN before the first."""
        if not self._seconds:
            return float("nan")
        return (self.num_steps - self.step) * sum(self._seconds) / len(self._seconds)


def number(row: Row, key: str) -> float:
    """A number of a row; NaN where it is null or missing."""
    value = row.get(key)
    return float("nan") if value is None else float(value)
