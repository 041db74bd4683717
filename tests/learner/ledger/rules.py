"""A ledger without a store, and the moves that tests of its rules make."""

from collections.abc import Callable
from typing import Any

import msgspec

from common import wire
from common.config import Config
from common.versions import Version
from common.wire import LeaseKey
from learner.ledger.routes import RoutesCheck
from learner.ledger.state import Ledger
from learner.ledger.visits import Visit

MakeGroup = Callable[..., wire.ScoredGroup]
V = [Version(0, number) for number in range(20)]
REJECTED = 5


def make_ledger(check: RoutesCheck | None = None, **values: Any) -> Ledger:
    defaults: dict[str, Any] = {"group_size": 2, "groups_per_step": 2, "updates_per_step": 1, "max_staleness": 1}
    checked = {} if check is None else {"routes_check": check}
    ledger = Ledger(Config(**{**defaults, **values}), lambda n: (n, "too long" if n == REJECTED else ""), **checked)
    ledger.begin(None)
    return ledger


def grant(ledger: Ledger, room: int = 1, version: Version = V[0], now: float = 0.0) -> list[Visit]:
    return ledger.grant("generator-0", version, room, now)


def train(ledger: Ledger, make_group: MakeGroup, *versions: Version) -> list[int]:
    """One step over groups sampled at each of the versions, or at the current one."""
    assert ledger.track.current is not None
    for version in versions or (ledger.track.current,) * 2:
        for visit in grant(ledger, 1, version):
            assert ledger.store(make_group(visit.key, version), b"").status == "stored"
    batch = [visit.number for visit in ledger.reserve(ledger.track.current, 2)]
    assert len(batch) == 2
    ledger.commit(ledger.track.current, tuple(batch))
    return batch


def scored_group(key: LeaseKey, versions: tuple[Version, ...], correct: tuple[float | None, ...]) -> wire.ScoredGroup:
    """A group whose completions have a token of each of the versions; where `correct` is None, grading failed."""
    spans = [wire.VersionSpan(i + 1, version) for i, version in enumerate(versions)]
    completion = wire.Completion(
        token_ids=wire.int_bytes([1] * len(versions)),
        logprobs=wire.float_bytes([-0.5] * len(versions)),
        versions=wire.span_bytes(spans),
        finish_reason=wire.FinishReason.STOP,
        seed=0,
    )
    completions = tuple(msgspec.structs.replace(completion, seed=seed) for seed in range(len(correct)))
    group = wire.Group(
        key=key, generator="g", prompt_id="p", answer="1", reward="exact", completions=completions, seconds=1.0
    )
    grades = tuple(
        wire.Grade(outcome=wire.Outcome.ERROR, correct=0.0, reward=0.0)
        if value is None
        else wire.Grade(outcome=wire.Outcome.WRONG, correct=value, reward=value)
        for value in correct
    )
    return wire.ScoredGroup(group=group, grades=grades, verifier="v")
