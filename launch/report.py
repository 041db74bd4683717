"""What is left of a run for people and scripts: summary.json, plot.png, and a few printed lines."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from common.files import write_atomically
from common.metrics import read_metrics
from launch.display import duration
from launch.progress import Row, number

SUMMARY, PLOT = "summary.json", "plot.png"
_ROLES = ("learner", "generator", "verifier", "ledger")


class Rows(NamedTuple):
    """The rows of a run, by kind; of a step that was repeated after a crash, the last one.

    Attributes:
        steps: One a step, in order.
        evaluations: One a source and step, in order.
        end: The last row; empty where the run did not end by itself.
    """

    steps: list[Row]
    evaluations: list[Row]
    end: Row


def read_rows(run_dir: Path) -> Rows:
    """The rows of the run's metrics."""
    steps: dict[int, Row] = {}
    evaluations: dict[tuple[int, str], Row] = {}
    end: Row = {}
    for row, _ in read_metrics(run_dir):
        if row["kind"] == "step":
            steps[row["step"]], end = row, {}
        elif row["kind"] == "evaluation":
            evaluations[row["step"], row["source"]] = row
        elif row["kind"] == "end":
            end = row
    return Rows([steps[i] for i in sorted(steps)], [evaluations[key] for key in sorted(evaluations)], end)


def write_report(run_dir: Path) -> str:
    """Writes summary.json and plot.png; returns lines for people, empty where no step was made.

    Raises:
        RunDirectoryError: The disk is full.
    """
    rows = read_rows(run_dir)
    if not rows.steps:
        return ""
    summary = summarize(rows)
    write_atomically(run_dir / SUMMARY, json.dumps(_plain(summary), indent=2).encode() + b"\n")
    from launch.plot import draw  # matplotlib takes a second to load

    write_atomically(run_dir / PLOT, draw(rows))
    return _describe(summary, run_dir)


def summarize(rows: Rows) -> dict[str, Any]:
    """The run in numbers; NaN where there is none."""
    accuracy = mean_accuracy(rows.evaluations)
    last = rows.steps[-1]
    return {
        "steps": last["step"],
        "epoch": number(last, "epoch"),
        "seconds": last["time"] - rows.steps[0]["time"] + number(rows.steps[0], "seconds"),
        "ended": rows.end.get("reason", "stopped before its end"),
        "reward_start": number(rows.steps[0], "reward"),
        "reward_end": number(last, "reward"),
        "accuracy_start": next(iter(accuracy.values()), math.nan),
        "accuracy_end": next(reversed(accuracy.values()), math.nan),
        "staleness_mean": _mean(rows.steps, "staleness_mean"),
        "staleness_max": max((number(row, "staleness_max") for row in rows.steps), default=math.nan),
        "groups": rows.end.get("accounts", {}),
        "quarantined": rows.end.get("accounts", last).get("quarantined", 0),
        "checkpoint": rows.end.get("checkpoint", ""),
        "idle": {role: _final(rows, f"{role}_idle") for role in _ROLES},
        "overlap_share": _final(rows, "overlap_share"),
        "learner_wait_share": _final(rows, "learner_wait_share", otherwise="learner_idle"),
    }


def mean_accuracy(evaluations: list[Row]) -> dict[int, float]:
    """Held-out accuracy of each evaluated step, over all sources: each prompt counts alike."""
    sums: dict[int, tuple[float, float]] = {}
    for row in evaluations:
        weight = max(1.0, number(row, "num_prompts"))
        total, weights = sums.get(row["step"], (0.0, 0.0))
        sums[row["step"]] = (total + weight * number(row, "accuracy"), weights + weight)
    return {step: total / weights for step, (total, weights) in sorted(sums.items())}


def _final(rows: Rows, key: str, *, otherwise: str = "") -> float:
    """Of the whole run from its last row, or else the mean of its steps."""
    return number(rows.end, key) if rows.end.get(key) is not None else _mean(rows.steps, otherwise or key)


def _mean(rows: list[Row], key: str) -> float:
    values = [value for row in rows if not math.isnan(value := number(row, key))]
    return sum(values) / len(values) if values else math.nan


def _plain(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe(summary: dict[str, Any], run_dir: Path) -> str:
    idle = ", ".join(f"{role} {share:.0%}" for role, share in summary["idle"].items() if not math.isnan(share))
    lines = [
        f"{summary['steps']} steps in {duration(summary['seconds'])} ({summary['ended']})",
        f"held-out accuracy: {summary['accuracy_start']:.3f} at the start, {summary['accuracy_end']:.3f} at the end",
        f"staleness: {summary['staleness_mean']:.2f} mean, {summary['staleness_max']:.0f} at most",
        f"idle: {idle}; generation overlapped training for {summary['overlap_share']:.0%} of the time",
        f"plot: {run_dir / PLOT}",
        f"summary: {run_dir / SUMMARY}",
    ]
    if num := summary["quarantined"]:
        prompts = "prompt" if num == 1 else "prompts"
        lines.append(f"quarantined: {num:.0f} {prompts}; why: python -m learner.ledger --audit {run_dir}")
    if summary["checkpoint"]:
        lines.append(f"checkpoint: {summary['checkpoint']}")
    return "\n".join(lines)
