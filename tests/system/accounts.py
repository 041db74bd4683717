"""What a run's own files say of each visit, and what a fault cost: lost, doubled, seconds to recover."""

import sqlite3
from collections import Counter
from contextlib import suppress
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from common.metrics import read_metrics
from common.versions import Lineages, Version
from learner.ledger.rows import visit_of
from learner.ledger.schema import FILE
from learner.ledger.store import Store
from learner.ledger.visits import Visit

NEEDS_PAYLOAD = ("scored", "reserved")
STEP_DEVIATION = 0.1  # standard deviation of the mean reward of a step of eight groups, as seen
NUM_DEVIATIONS = 6  # one normal variable in a billion falls below


class Cost(NamedTuple):
    """What a fault cost.

    Attributes:
        num_lost: Visits handed out that are in no state, or without the groups that their state needs.
        num_doubled: Groups that the rows of the path's steps tell of, and that are no visit of that step in the
            ledger's file: it names one step for each visit, the last.
        recovery_s: From the fault to the end of the first step that trained a group leased after it; None where the run
            ended with the fault.
    """

    num_lost: int
    num_doubled: int
    recovery_s: float | None


def visits(run_dir: Path) -> list[Visit]:
    """All visits as the ledger's file has them, by number; of a live run too."""
    return [visit_of(row, 0.0) for row in _query(run_dir, "SELECT * FROM visits ORDER BY number")]


def leases(run_dir: Path, holder: str, since: float = 0.0) -> list[Visit]:
    """The visits that a generator holds, granted after some time."""
    return [visit for visit in visits(run_dir) if visit.holder == holder and visit.granted_at > since]


def makers(run_dir: Path) -> set[str]:
    """The generators that made the trained groups that are still on disk."""
    store, found = Store(run_dir, read_only=True), set[str]()
    try:
        for visit in visits(run_dir):
            if visit.state.value == "trained":
                with suppress(KeyError):  # a checkpoint has freed it
                    scored = store.payload(visit.number)
                    assert scored is not None
                    found.add(scored.group.generator)
    finally:
        store.close()
    return found


def lineages(run_dir: Path) -> Lineages:
    """The tree of versions."""
    store = Store(run_dir, read_only=True)
    try:
        return Lineages(store.head().branches)
    finally:
        store.close()


def trained(run_dir: Path) -> dict[Version, list[Visit]]:
    """The visits of each step, by the version that the step began from."""
    steps: dict[Version, list[Visit]] = {}
    for visit in visits(run_dir):
        if visit.state.value == "trained":
            assert visit.step is not None
            steps.setdefault(visit.step, []).append(visit)
    return steps


def path_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of the steps that made the newest weights, by step: a later lineage's in place of those it undid."""
    path: dict[int, dict[str, Any]] = {}
    for row, _ in read_metrics(run_dir):
        if row["kind"] == "step":
            path = {step: earlier for step, earlier in path.items() if step < row["step"]} | {row["step"]: row}
    return list(path.values())


def assert_curve_is_unbroken(run_dir: Path) -> None:
    """The path's steps are gapless from 1, each has one row in its lineage, and the reward does not fall.

    That it does not fall is judged by the means of the path's halves, so a short run shows little of it.
    """
    rows = [row for row, _ in read_metrics(run_dir) if row["kind"] == "step"]
    twice = [key for key, num in Counter((row["lineage"], row["step"]) for row in rows).items() if num > 1]
    assert not twice, f"steps with several rows in one lineage: {twice}"
    path = path_rows(run_dir)
    assert [row["step"] for row in path] == list(range(1, len(path) + 1))
    half = len(path) // 2
    first, second = ([row["reward"] for row in part] for part in (path[:half], path[half:]))
    noise = NUM_DEVIATIONS * STEP_DEVIATION * sqrt(2 / half)
    assert mean(second) > mean(first) - noise, (first, second)


def cost(run_dir: Path, fault_at: float | None = None) -> Cost:
    """What the run's files say of a fault at a time, in seconds since the epoch; of a run that it ended, where None."""
    found = visits(run_dir)
    kept = {number for (number,) in _query(run_dir, "SELECT visit FROM payloads")}
    without = [v for v in found if v.state.value in NEEDS_PAYLOAD and v.number not in kept]
    handed_out = _handed_out(run_dir)
    steps = trained(run_dir)
    rows = {Version(row["lineage"], row["step"] - 1): int(row["num_groups"]) for row in path_rows(run_dir)}
    return Cost(
        num_lost=len(set(range(handed_out)) ^ {visit.number for visit in found}) + len(without),
        num_doubled=sum(num_groups - len(steps.get(step, ())) for step, num_groups in rows.items()),
        recovery_s=None if fault_at is None else recovery_s(run_dir, fault_at),
    )


def recovery_s(run_dir: Path, fault_at: float) -> float | None:
    """From a fault to the end of the first step that trained a group leased after it; None before there is one."""
    ends = {
        Version(row["lineage"], row["step"]): row["time"] for row, _ in read_metrics(run_dir) if row["kind"] == "step"
    }
    steps = {visit.step.next() for visit in visits(run_dir) if visit.step is not None and visit.granted_at > fault_at}
    ended = [ends[step] for step in steps if step in ends]
    return min(ended) - fault_at if ended else None


def _handed_out(run_dir: Path) -> int:
    store = Store(run_dir, read_only=True)
    try:
        return store.head().num_visits
    finally:
        store.close()


def _query(run_dir: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(f"{(run_dir / FILE).as_uri()}?mode=ro", uri=True)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()
