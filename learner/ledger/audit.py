"""The audit of a run, live or dead: does every visit handed out have exactly one state, and all that goes with it."""

import time
from pathlib import Path
from typing import NamedTuple

from common.config import Config
from common.layout import read_resolved
from common.wire import VisitState
from learner.ledger.store import Store
from learner.ledger.waits import run_waits_for

_MOST_NAMED = 20


class Audit(NamedTuple):
    """What an audit found.

    Attributes:
        lines: For people.
        wrong: What does not hold; empty in a sound run.
    """

    lines: list[str]
    wrong: list[str]


def audit(run_dir: Path) -> Audit:
    """Reads the run's file, and changes nothing.

    Raises:
        RunDirectoryError: There is no ledger, or it cannot be read.
    """
    config, store = read_resolved(run_dir), Store(run_dir, read_only=True)
    try:
        store.check_whole()
        num_cut = store.num_cut_payloads()
        store.begin_reading()
        counts = dict(store.rows("SELECT state, COUNT(*) FROM visits GROUP BY state"))
        wrong = _wrong(store, config, counts)
        if num_cut:
            wrong.append(f"{num_cut} stored groups are missing from their files, or cut")
        return Audit(_lines(store, config, counts), wrong)
    finally:
        store.close()


def _lines(store: Store, config: Config, counts: dict[str, int]) -> list[str]:
    now = time.time()
    lines = [f"{state.value:<12} {counts.get(state.value, 0)}" for state in VisitState]
    lines.append(f"{'handed out':<12} {store.head().num_visits}")
    num_stored = store.rows("SELECT COUNT(*) FROM payloads")[0][0]
    of_ledger, of_groups = (size / 1e6 for size in store.size_bytes())
    lines.append(f"on disk: {of_ledger:,.1f} MB of accounts, {of_groups:,.1f} MB with {num_stored} stored groups")
    if oldest := store.rows(
        "SELECT number, attempt, holder, granted_at FROM visits WHERE state = 'leased' ORDER BY granted_at LIMIT 1"
    ):
        number, attempt, holder, granted_at = oldest[0]
        lines.append(f"oldest lease: visit {number}, attempt {attempt}, {holder}, {now - granted_at:.1f} s")
    if store.meta("prepared") is not None:
        ledger, evaluations = store.ledger(config, now), store.evaluations(config, now)
        waits = run_waits_for(config, ledger, evaluations, None, store.manifest())
        lines.append(f"waiting for: {waits or 'nothing'}")
    return [*lines, *_quarantined(store, counts.get(VisitState.QUARANTINED, 0))]


def _quarantined(store: Store, num: int) -> list[str]:
    """The newest of those that were given up, with their reasons."""
    query = "SELECT number, prompt, reason FROM visits WHERE state = 'quarantined' ORDER BY number DESC LIMIT ?"
    rows = store.rows(query, _MOST_NAMED)
    lines = [f"quarantined: visit {number} ({store.prompt(prompt).id}): {reason}" for number, prompt, reason in rows]
    return lines + ([f"quarantined: {num - len(rows)} more"] if num > len(rows) else [])


_CHECKS = {
    "visits without a payload that a step needs": "SELECT COUNT(*) FROM visits "
    "WHERE state IN ('scored', 'reserved') AND number NOT IN (SELECT visit FROM payloads)",
    "payloads without a visit that needs them": "SELECT COUNT(*) FROM payloads WHERE visit NOT IN "
    "(SELECT number FROM visits WHERE state IN ('scored', 'reserved', 'trained'))",
    "visits without a reason": "SELECT COUNT(*) FROM visits WHERE reason = ''",
    "visits in a step that have none, or the other way round": "SELECT COUNT(*) FROM visits "
    "WHERE state != 'scored' AND (state IN ('reserved', 'trained')) != (step != '')",
    "leases without a holder": "SELECT COUNT(*) FROM visits WHERE (state = 'leased') != (holder != '')",
}


def _wrong(store: Store, config: Config, counts: dict[str, int]) -> list[str]:
    wrong = [f"{num} {what}" for what, query in _CHECKS.items() if (num := store.rows(query)[0][0])]
    head = store.head()
    if (total := sum(counts.values())) != head.num_visits:
        wrong.append(f"the states sum to {total}, expected {head.num_visits} visits handed out")
    sizes = store.rows(
        "SELECT state, step, COUNT(*) FROM visits WHERE state IN ('reserved', 'trained') GROUP BY state, step"
    )
    for state, step, num in sizes:
        if num != config.groups_per_step:
            wrong.append(f"{num} visits are {state} from {step}, expected groups_per_step = {config.groups_per_step}")
    num_steps = sum(state == VisitState.TRAINED for state, _, _ in sizes)
    if head.current is not None and num_steps != head.current.number:
        wrong.append(f"the visits of {num_steps} steps are trained, expected {head.current.number}")
    return wrong
