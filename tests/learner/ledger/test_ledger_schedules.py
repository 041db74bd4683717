"""Random schedules of everything that can happen to a ledger, over the real SQLite file."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common import wire
from common.config import Config
from common.errors import RefusedError
from common.learning import LearnerConfig, LossConfig
from common.sections import LeaseConfig
from common.versions import Version
from common.wire import LeaseKey, VisitState
from learner.ledger.evaluations import EvaluationChanges
from learner.ledger.store import Store
from tests.learner.ledger.rules import scored_group

NUM_PROMPTS = 7
NOTHING = EvaluationChanges([], [], [])
ENDED = {"filtered", "rejected", "quarantined", "unused"}


class Schedules(RuleBasedStateMachine):
    """A ledger that is killed and read back at any moment, beside a plain account of what was trained."""

    @initialize(
        max_staleness=st.integers(0, 3), filter_uniform=st.booleans(), late=st.sampled_from(["give_back", "train_rest"])
    )
    def start(self, max_staleness: int, filter_uniform: bool, late: Literal["give_back", "train_rest"]) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.config = Config(
            group_size=3,
            groups_per_step=2,
            updates_per_step=1,
            max_staleness=max_staleness,
            lease=LeaseConfig(heartbeat_timeout_s=5, completion_timeout_s=20, late=late, max_attempts=5),
            learner=LearnerConfig(keep_checkpoints=2),
            loss=LossConfig(filter_uniform=filter_uniform),
        )
        self.store = Store(Path(self.directory.name))
        with self.store.transaction() as sql:
            sql.execute("INSERT INTO files VALUES (0, 'train', 's', 'p', '', 1.0, ?)", (NUM_PROMPTS,))
            for row in range(NUM_PROMPTS):
                rejected = "too long" if row == 3 else ""
                sql.execute("INSERT INTO prompts VALUES (?, 0, ?, ?, ?, ?)", (row, row, b"", rejected, b""))
            sql.execute("INSERT INTO meta VALUES ('prepared', x'00')")
        self.ledger = self.store.ledger(self.config, 0.0)
        self.now = 0.0
        self.results: list[wire.ScoredGroup] = []
        self.leases: list[tuple[LeaseKey, Version]] = []
        self.finished: set[LeaseKey] = set()
        self.committed: list[tuple[Version, tuple[int, ...]]] = []
        self.checkpoints: list[tuple[Version, int]] = []
        self.num_commits = self.sequence = 0
        self.sampled: dict[LeaseKey, tuple[Version, ...]] = {}
        self.call(lambda: self.ledger.begin(None))

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.directory.cleanup()

    def call(self, action: Any) -> Any:
        """One call, stored as the service stores it."""
        try:
            return action()
        finally:
            self.store.save(self.ledger.drain(), NOTHING)

    @property
    def current(self) -> Version:
        assert self.ledger.track.current is not None
        return self.ledger.track.current

    def past(self, back: int) -> Version:
        """A version on the learner's path, `back` updates ago."""
        version = Version(self.current.lineage, max(0, self.current.number - back))
        while (
            branch := self.ledger.track.lineages.branches[version.lineage]
        ) is not None and version.number < branch.number:
            version = Version(branch.lineage, version.number)
        return version

    @rule(room=st.integers(1, 6), back=st.integers(0, 4), name=st.sampled_from("ab"))
    def grant(self, room: int, back: int, name: str) -> None:
        version = self.past(back)
        before = self.ledger.num_admitted
        visits = self.call(lambda: self.ledger.grant(name, version, room, self.now))
        assert not visits or self.ledger.num_admitted <= max(before, self.ledger.budget(version))
        assert self.ledger.track.lineages.staleness(version, self.current) <= self.config.max_staleness or not visits
        self.leases += [(visit.key, version) for visit in visits]

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        correct=st.sampled_from(
            [(1.0, 0.0, 1.0), (1.0, 0.0, None), (1.0, 1.0, 1.0), (None, None, 1.0), (1.0, 0.0), (1.0, 1.0), (1.0,)]
        ),
        newer=st.booleans(),
    )
    def sample(self, data: st.DataObject, correct: tuple[float | None, ...], newer: bool) -> None:
        key, version = data.draw(st.sampled_from(self.leases))
        self.finished.add(key)
        versions = (version, self.current) if newer and version != self.current else (version,)
        self.results.append(scored_group(key, versions, correct))

    @precondition(lambda self: self.results)
    @rule(data=st.data())
    def hand_in(self, data: st.DataObject) -> None:
        """Any result so far: late, re-sent or out of order."""
        self.store_group(data.draw(st.sampled_from(self.results)))

    def store_group(self, scored: wire.ScoredGroup) -> None:
        verdict = self.call(lambda: self.ledger.store(scored, wire.encode(scored)))
        if verdict.status == "stored" and self.state_of(scored.group.key.visit) == "scored":
            assert scored.group.key not in self.sampled
            expected = {"give_back": {3}, "train_rest": {2, 3}}[self.config.lease.late]
            assert len(scored.grades) in expected
            self.sampled[scored.group.key] = tuple(span.version for span in scored.group.completions[0].spans())

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), name=st.sampled_from("ab"))
    def give_back(self, data: st.DataObject, name: str) -> None:
        """Of any lease so far, by either: what its holder has no more changes nothing."""
        key, _ = data.draw(st.sampled_from(self.leases))
        visit = next((v for v in self.ledger.visits(VisitState.LEASED) if v.number == key.visit), None)
        is_held = visit is not None and (visit.key, visit.holder) == (key, name)
        before = self.ledger.accounts()
        for was_held in (is_held, False):
            assert self.call(lambda: self.ledger.give_back(name, wire.Returned(key, "late"))) is was_held
        assert self.ledger.accounts()["leased"] == before["leased"] - is_held
        assert is_held or self.ledger.accounts() == before

    @rule(seconds=st.floats(0, 12), beats=st.booleans())
    def wait(self, seconds: float, beats: bool) -> None:
        self.now += seconds
        if beats:
            held = tuple(key for key, _ in self.leases)
            self.call(lambda: [self.ledger.beat(name, held, self.now, self.finished) for name in "ab"])
        leased = self.ledger.visits(VisitState.LEASED)
        kept = {v.key for v in leased if beats and v.key in self.finished}
        self.call(lambda: self.ledger.expire(self.now))
        assert kept <= {v.key for v in self.ledger.visits(VisitState.LEASED)}

    @rule(name=st.sampled_from("ab"))
    def replace(self, name: str) -> None:
        self.call(lambda: self.ledger.free(name))

    @rule()
    def reserve(self) -> None:
        batch = self.call(lambda: self.ledger.reserve(self.current, 2))
        assert len(batch) in (0, 2)
        assert [v.number for v in self.call(lambda: self.ledger.reserve(self.current, 2))] == [v.number for v in batch]

    @rule()
    def recover(self) -> None:
        """No deadlock: once dead leases are overdue, a healthy fleet makes the next batch whole."""
        self.now += 21
        self.call(lambda: self.ledger.expire(self.now))
        for visit in self.call(lambda: self.ledger.grant("a", self.current, 6, self.now)):
            self.leases.append((visit.key, self.current))
            self.store_group(scored_group(visit.key, (self.current,), (1.0, 0.0, 1.0)))
        assert len(self.call(lambda: self.ledger.reserve(self.current, 2))) == 2

    @precondition(lambda self: self.ledger.visits(VisitState.RESERVED))
    @rule(again=st.booleans())
    def commit(self, again: bool) -> None:
        version, visits = self.current, tuple(v.number for v in self.ledger.visits(VisitState.RESERVED))
        for visit in self.ledger.visits(VisitState.RESERVED):
            oldest = max(self.ledger.track.lineages.staleness(v, version) for v in self.sampled[visit.key])
            assert oldest <= self.config.max_staleness
            assert wire.decode(wire.encode(self.store.payload(visit.number))).group.key == visit.key  # type: ignore[union-attr]
        self.num_commits += 1
        self.sequence = self.call(lambda: self.ledger.commit(version, visits))
        assert self.sequence == self.num_commits
        self.committed.append((version, visits))
        if again:
            self.crash()
            assert self.call(lambda: self.ledger.commit(version, visits)) == self.sequence
        assert self.current == version.next()

    @rule()
    def checkpoint(self) -> None:
        self.call(lambda: self.ledger.checkpoint(self.current))
        self.checkpoints.append((self.current, self.sequence))

    @rule(fallback=st.integers(0, 2))
    def resume(self, fallback: int) -> None:
        usable = self.checkpoints[: len(self.checkpoints) - fallback]
        version, sequence = usable[-1] if usable else (None, 0)
        with pytest.raises(RefusedError):
            self.call(lambda: self.ledger.begin(version or Version(0, 0), sequence + 1))
        try:
            began = self.call(lambda: self.ledger.begin(version, sequence))
        except RefusedError:
            return
        assert began.number == (version.number if version else 0)
        self.checkpoints, self.sequence = usable, sequence
        lineages = self.ledger.track.lineages
        self.committed = [
            (v, n) for v, n in self.committed if lineages.staleness(v.next(), began) == began.number - v.number - 1
        ]

    @rule()
    def crash(self) -> None:
        """The process dies; what was stored is read back."""
        before = (self.ledger.accounts(), self.ledger.head())
        self.ledger = self.store.ledger(self.config, self.now)
        assert (self.ledger.accounts(), self.ledger.head()) == before

    def state_of(self, number: int) -> str:
        return self.store.rows("SELECT state FROM visits WHERE number = ?", number)[0][0]

    @invariant()
    def the_states_sum_to_the_visits_handed_out(self) -> None:
        if hasattr(self, "ledger"):
            accounts = self.ledger.accounts()
            assert sum(accounts.values()) == self.ledger.head().num_visits
            stored = Counter(dict(self.store.rows("SELECT state, COUNT(*) FROM visits GROUP BY state")))
            assert stored == Counter({state: num for state, num in accounts.items() if num})

    @invariant()
    def nothing_is_trained_twice_and_all_that_is_trained_was_committed(self) -> None:
        if hasattr(self, "ledger"):
            trained = [number for _, visits in self.committed for number in visits]
            assert len(trained) == len(set(trained))
            rows = self.store.rows("SELECT number FROM visits WHERE state = 'trained' ORDER BY number")
            assert [number for (number,) in rows] == sorted(trained)

    @invariant()
    def payloads_are_there_exactly_where_a_step_may_need_them(self) -> None:
        if hasattr(self, "ledger"):
            kept = {number for (number,) in self.store.rows("SELECT visit FROM payloads")}
            live = {
                v.number
                for s in (VisitState.SCORED, VisitState.RESERVED, VisitState.TRAINED)
                for v in self.ledger.visits(s)
            }
            assert kept == live

    @invariant()
    def what_has_ended_has_a_reason(self) -> None:
        if hasattr(self, "ledger"):
            assert not self.store.rows("SELECT 1 FROM visits WHERE reason = ''")


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large),
)
