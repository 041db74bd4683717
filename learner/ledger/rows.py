"""Visits as rows of the ledger's tables."""

from typing import Any

import msgspec

from common.versions import Version
from common.wire import VisitState
from learner.ledger.evaluations import EvaluationVisit, Result
from learner.ledger.visits import Visit


def _text(version: Version | None) -> str:
    return "" if version is None else str(version)


def _version(text: str) -> Version | None:
    return Version.parse(text) if text else None


def visit_row(visit: Visit) -> tuple[object, ...]:
    """The columns of table `visits`."""
    return (
        visit.number,
        visit.prompt,
        visit.state.value,
        visit.reason,
        visit.attempt,
        visit.holder,
        _text(visit.granted),
        visit.granted_at,
        visit.pinned,
        visit.returned,
        " ".join(map(str, visit.versions)),
        _text(visit.step),
    )


def visit_of(row: tuple[Any, ...], now: float) -> Visit:
    """The visit in a row of table `visits`; its lease was heard of `now`."""
    number, prompt, state, reason, attempt, holder, granted, granted_at, pinned, returned, versions, step = row
    return Visit(
        number=number,
        prompt=prompt,
        attempt=attempt,
        holder=holder,
        granted=_version(granted),
        granted_at=granted_at,
        heard_at=now,
        state=VisitState(state),
        reason=reason,
        pinned=bool(pinned),
        returned=bool(returned),
        versions=tuple(Version.parse(text) for text in versions.split()),
        step=_version(step),
    )


def evaluation_row(visit: EvaluationVisit) -> tuple[object, ...]:
    """The columns of table `evaluation_visits`."""
    return (
        visit.number,
        visit.prompt,
        visit.source,
        str(visit.version),
        visit.asked_at,
        visit.attempt,
        visit.holder,
        _text(visit.granted),
        visit.granted_at,
        None if visit.result is None else msgspec.msgpack.encode(visit.result),
    )


def evaluation_visit_of(row: tuple[Any, ...], now: float) -> EvaluationVisit:
    """The visit in a row of table `evaluation_visits`; its lease was heard of `now`."""
    number, prompt, source, version, asked_at, attempt, holder, granted, granted_at, result = row
    return EvaluationVisit(
        number=number,
        prompt=prompt,
        attempt=attempt,
        holder=holder,
        granted=_version(granted),
        granted_at=granted_at,
        heard_at=now,
        source=source,
        version=Version.parse(version),
        asked_at=asked_at,
        result=None if result is None else msgspec.msgpack.decode(result, type=Result),
    )
