"""The state machine of prompt visits (docs/architecture.md): no sockets, no files, no clock of its own.

    new ─► leased ─► scored ─► reserved ─► trained
             │ ▲       │ ▲         │          │
             ▼ │       │ └─────────┴──────────┘  the learner resumed from a checkpoint before it
           waiting ◄───┘ expired

Every call either refuses and changes nothing that was asked for, or changes the state; `drain` then returns what has
to be stored, as one transaction, before anyone hears of it.
"""

from collections.abc import Callable, Container, Iterable
from functools import partial

from common import wire
from common.config import Config
from common.errors import RefusedError
from common.versions import Version
from common.wire import VisitState
from learner.ledger.batches import Batches
from learner.ledger.book import Book
from learner.ledger.judgement import (
    MIN_GRADED,
    malformed_reason,
    min_completions,
    num_graded,
    uniform_reason,
    versions_of,
)
from learner.ledger.returns import Returns
from learner.ledger.routes import RoutesCheck, unexpected_routes
from learner.ledger.track import START, Track, check_position
from learner.ledger.visits import Changes, Head, Visit, renew


class Ledger:
    """All visits of a run, and the learner's version.

    Attributes:
        track: Where the learner is.
        closing: Why the run ends; empty while it does not.
    """

    def __init__(
        self,
        config: Config,
        prompt_of: Callable[[int], tuple[int, str]],
        *,
        routes_check: RoutesCheck = lambda _, group: unexpected_routes(group),
        head: Head | None = None,
        live: Iterable[Visit] = (),
        ended: Iterable[tuple[int, VisitState]] = (),
    ) -> None:
        """A new ledger, or one as it was stored.

        Args:
            config: Of the run.
            prompt_of: Row of a visit's prompt, and why the prompt is outside the limits (empty: it is not).
            routes_check: What is wrong with the routed experts of a group, given its prompt's row.
            head: As drained last.
            live: Visits that have not ended.
            ended: Visits that have, with their state.
        """
        head = head or Head()
        self._config, self._prompt_of, self._routes_check = config, prompt_of, routes_check
        self._book = Book(head.num_visits, live, ended)
        self.track, self.closing = Track(head), head.closing
        self._returns = Returns(config, self._book, self.track)
        self._batches = Batches(config, self._book, self._returns)
        self._stored_head = head

    def accounts(self) -> dict[str, int]:
        """How many visits are in each state; the sum is the visits handed out."""
        return self._book.accounts()

    def visits(self, state: VisitState) -> list[Visit]:
        """The visits in a state that have not ended, by number."""
        return self._book.visits(state)

    def head(self) -> Head:
        """All but the visits."""
        return Head(
            current=self.track.current,
            branches=self.track.lineages.branches,
            commits_before=self.track.commits_before,
            checkpoints=self.track.checkpoints,
            horizon=self.track.horizon,
            num_commits=self.track.num_commits,
            num_visits=self._book.num_visits,
            closing=self.closing,
        )

    def drain(self) -> Changes:
        """What changed since the last call."""
        head = self.head()
        changes = self._book.drain(None if head == self._stored_head else head)
        self._stored_head = head
        return changes

    # Generators

    def budget(self, version: Version) -> int:
        """How many visits may be admitted and not consumed before a generator at `version` gets no lease.

        (eta + g - v + 1) * groups_per_step, where v - g is the staleness of what the generator would sample: the last
        one admitted is consumed at the step from version g + eta, no later.
        """
        if self.track.current is None or self.closing or not self.track.knows(version):
            return 0
        behind = self.track.staleness(version)
        return (self._config.max_staleness - behind + 1) * self._config.groups_per_step

    @property
    def num_admitted(self) -> int:
        """Visits that take up the staleness budget: admitted and not yet consumed."""
        return self._book.count(VisitState.LEASED, VisitState.SCORED, VisitState.RESERVED)

    def grant(self, name: str, version: Version, room: int, now: float) -> list[Visit]:
        """Leases up to `room` visits to a generator whose engine holds `version`: those that came back first."""
        granted: list[Visit] = []
        num_free = min(room, self.budget(version) - self.num_admitted)
        waiting = iter(sorted(self.visits(VisitState.WAITING), key=lambda v: not v.pinned) if num_free > 0 else ())
        while len(granted) < num_free:
            visit = next(waiting, None) or self._next()
            visit.lease(name, version, now)
            self._book.move(visit, VisitState.LEASED, f"granted to {name} at {version}")
            granted.append(visit)
        return granted

    def beat(
        self, name: str, holds: tuple[wire.LeaseKey, ...], now: float, finished: Container[wire.LeaseKey] = ()
    ) -> tuple[wire.LeaseKey, ...]:
        """Renews the leases that a generator holds, and returns those that are no longer wanted.

        Of those that are `finished`, as it says, no completion is late any more.
        """
        return renew(partial(self._book.find, VisitState.LEASED), name, holds, now, finished)

    def give_back(self, name: str, lease: wire.Returned) -> bool:
        """Ends the attempt that its holder gives back; returns whether it still had it."""
        return self._returns.return_lease(name, lease)

    def free(self, name: str) -> int:
        """Ends the leases of a process that was replaced; returns how many there were."""
        return self._returns.free(name)

    def expire(self, now: float) -> int:
        """Ends the leases whose heartbeat or completions are overdue; returns how many there were."""
        return self._returns.lapse(now)

    def store(self, scored: wire.ScoredGroup, payload: bytes) -> wire.Verdict:
        """Takes a scored group, or says why not. Fenced by (visit, attempt); the first one stored wins.

        Args:
            scored: The group with its grades.
            payload: The same, encoded; kept as it is.
        """
        key = scored.group.key
        visit = self._book.find(VisitState.LEASED, key.visit)
        if visit is None or visit.attempt != key.attempt:
            return self._returns.late_verdict(key)
        config = self._config
        versions, sizes = versions_of(scored.group), (min_completions(config), config.group_size)
        reason = malformed_reason(scored, versions, sizes, len(self.track.lineages.branches))
        if reason := reason or self._routes_check(visit.prompt, scored.group):
            self._returns.give_back(visit, f"malformed: {reason}")
            return wire.Verdict(status="refused", reason=f"malformed: {reason}")
        visit.versions = versions
        if self._returns.staleness(visit) > config.max_staleness:
            return wire.Verdict(status="refused", reason=self._returns.expire(visit))
        if num_graded(scored.grades) < MIN_GRADED:
            return wire.Verdict(status="refused", reason=self._returns.ungraded(visit, scored))
        if config.loss.filter_uniform and (reason := uniform_reason(scored.grades)):
            self._book.move(visit, VisitState.FILTERED, reason)
            return wire.Verdict(status="stored", reason=reason)
        self._book.move(visit, VisitState.SCORED, f"graded by {scored.verifier}", payload=payload)
        return wire.Verdict(status="stored")

    # The learner

    def begin(self, checkpoint: Version | None, sequence: int = 0, num_visits: int = 0) -> Version:
        """The version under which the learner goes on from `checkpoint`; what it trained after that is scored again.

        `sequence` is the number of the commit that made it, `num_visits` how many were handed out by then.

        Raises:
            RefusedError: The checkpoint is not of this run's path, or what followed it is no longer kept.
        """
        if checkpoint is None and not self.track.num_commits:
            self.track.current = version = START
        else:
            version = self._resume(checkpoint or START, sequence, num_visits)
        self._batches.break_up("it did not end")
        self.closing = ""
        self._returns.expire_outdated()
        return version

    def reserve(self, version: Version, num_groups: int) -> list[Visit]:
        """The batch of the step from `version`, most stale first; empty while it is not whole. Idempotent by version.

        A step that a resume undid is repeated with its groups, as far as they are not too stale now.

        Raises:
            RefusedError: The learner is not at that version, or asks for another number of groups than configured.
        """
        if self.closing or version != self.track.current:
            raise RefusedError(
                f"found a batch asked for {version}, expected {self.track.current} {self.closing}".rstrip()
            )
        if num_groups != self._config.groups_per_step:
            raise RefusedError(f"found {num_groups} groups, expected groups_per_step = {self._config.groups_per_step}")
        if self._book.count(VisitState.RESERVED):
            return self._batches.in_order(self.visits(VisitState.RESERVED))
        batch = self._batches.next()
        for visit in batch:
            visit.step = version
            self._book.move(visit, VisitState.RESERVED, f"for the step from {version}")
        return batch

    def reserved(self, version: Version, number: int) -> Visit | None:
        """A visit of the batch of the step from `version`; None where it is in none.

        Raises:
            RefusedError: The learner is not at that version.
        """
        if version != self.track.current:
            raise RefusedError(f"found a group of the step from {version} asked for, expected {self.track.current}")
        return self._book.find(VisitState.RESERVED, number)

    def lose(self, visit: Visit, reason: str) -> None:
        """What was stored of a reserved visit is gone: it is sampled again, and the learner reserves another batch."""
        self._batches.break_up(reason)
        self._returns.give_back(visit, reason)

    def awaited_pins(self) -> list[Visit]:
        """Leased, pinned visits that the learner does not step past."""
        return self._batches.awaited()

    def commit(self, version: Version, visits: tuple[int, ...]) -> int:
        """Marks the batch as trained; returns the number of the commit in the ledger's order. Idempotent by version.

        Raises:
            RefusedError: The learner is not at that version, or these are not the visits reserved for it.
        """
        expected = [visit.number for visit in self.visits(VisitState.RESERVED)]
        if version != self.track.current:
            if self.track.includes(version.next()) and self._trained_from(version) in ([], sorted(visits)):
                return self.track.sequence(version.next())
            raise RefusedError(f"found a commit of the step from {version}, expected one from {self.track.current}")
        if not expected or sorted(visits) != expected:
            raise RefusedError(f"found a commit of visits {sorted(visits)}, expected {expected}")
        for visit in self.visits(VisitState.RESERVED):
            self._book.move(visit, VisitState.TRAINED, f"in the step from {version}")
        self.track.advance()
        self._returns.expire_outdated()
        return self.track.num_commits

    def checkpoint(self, version: Version) -> None:
        """The checkpoint of `version` is durable: frees what no resume can need any more.

        Raises:
            RefusedError: The learner was never at that version, or has left its path.
        """
        if self.track.save(version, self._config.learner.keep_checkpoints):
            for visit in self.visits(VisitState.TRAINED):
                if self._returns.is_contained(visit, self.track.checkpoints[0]):
                    self._book.conclude(visit)

    def finish(self, reason: str) -> None:
        """No more leases: what is not trained is unused."""
        if self.closing:
            return
        self.closing = reason or "the run ended"
        for state in (VisitState.WAITING, VisitState.LEASED, VisitState.SCORED, VisitState.RESERVED):
            for visit in self.visits(state):
                self._book.move(visit, VisitState.UNUSED, f"{state.value} when the run ended: {self.closing}")

    # Transitions

    def _next(self) -> Visit:
        """The next visit in the order of the data whose prompt is within the limits."""
        while True:
            prompt, rejected = self._prompt_of(self._book.num_visits)
            visit = self._book.open(prompt)
            if not rejected:
                return visit
            self._book.move(visit, VisitState.REJECTED, rejected)

    def _resume(self, checkpoint: Version, sequence: int, num_visits: int) -> Version:
        check_position(checkpoint, num_visits, self._book.num_visits)
        self.track.check_resume(checkpoint, sequence)
        for visit in self.visits(VisitState.TRAINED):
            if not self._returns.is_contained(visit, checkpoint):
                self._book.move(visit, VisitState.SCORED, f"the learner resumed from {checkpoint}")
        return self.track.resume(checkpoint)

    def _trained_from(self, version: Version) -> list[int]:
        return [visit.number for visit in self.visits(VisitState.TRAINED) if visit.step == version]
