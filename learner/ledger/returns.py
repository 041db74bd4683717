"""Attempts that came to nothing: their visits go to the front of the queue, or out where their attempts are used up."""

from common import wire
from common.config import Config
from common.versions import Version
from common.wire import VisitState
from learner.ledger.book import Book
from learner.ledger.judgement import MIN_GRADED, num_graded
from learner.ledger.track import START, Track
from learner.ledger.visits import Visit


class Returns:
    """How visits come back from a generator, a verifier, or the queue of the scored."""

    def __init__(self, config: Config, book: Book, track: Track) -> None:
        """All three are shared with the ledger."""
        self._config, self._book, self._track = config, book, track

    def staleness(self, visit: Visit) -> int:
        """Of a stored group: that of its oldest token."""
        assert visit.versions
        return max(map(self._track.staleness, visit.versions))

    def is_contained(self, visit: Visit, version: Version) -> bool:
        """Whether the weights of `version` were trained on the visit."""
        assert visit.step is not None
        return self._track.leads_to(visit.step.next(), version)

    def lease_staleness(self, visit: Visit) -> int:
        """Of the oldest token that a leased group may have."""
        assert visit.granted is not None
        return self._track.staleness(visit.granted)

    def give_back(self, visit: Visit, reason: str) -> None:
        """Ends an attempt: the prompt goes to the front of the queue, or out where its attempts are used up."""
        visit.versions = ()
        if visit.attempt >= self._config.lease.max_attempts:
            reason = f"{visit.attempt} attempts used up, the last: {reason}"
            self._book.move(visit, VisitState.QUARANTINED, reason)
        else:
            self._book.move(visit, VisitState.WAITING, reason)

    def return_lease(self, name: str, lease: wire.Returned) -> bool:
        """Ends the attempt that its holder gives back; returns whether it still had it."""
        visit = self._book.find(VisitState.LEASED, lease.key.visit)
        if visit is None or not visit.is_held(lease.key, name):
            return False
        self.give_back(visit, f"{name} gave it back: {lease.reason}")
        return True

    def free(self, name: str) -> int:
        """Ends the leases of a process that was replaced; returns how many there were."""
        held = [visit for visit in self._book.visits(VisitState.LEASED) if visit.holder == name]
        for visit in held:
            self.give_back(visit, f"{name} was replaced")
        return len(held)

    def lapse(self, now: float) -> int:
        """Ends the leases whose heartbeat or completions are overdue; returns how many there were."""
        num = 0
        for visit in self._book.visits(VisitState.LEASED):
            if reason := visit.lapse_reason(self._config.lease, now):
                self.give_back(visit, reason)
                num += 1
        return num

    def late_verdict(self, key: wire.LeaseKey) -> wire.Verdict:
        """What to say of a result whose lease is over."""
        if not 0 <= key.visit < self._book.num_visits:
            return wire.Verdict(status="refused", reason=f"visit {key.visit} was never handed out")
        state = self._book.state_of(key.visit)
        if state in (VisitState.SCORED, VisitState.RESERVED, VisitState.TRAINED, VisitState.FILTERED):
            return wire.Verdict(status="duplicate", reason=f"visit {key.visit} is {state.value}")
        return wire.Verdict(
            status="refused", reason=f"attempt {key.attempt} is over: visit {key.visit} is {state.value}"
        )

    def expire(self, visit: Visit) -> str:
        """Gives back a visit that has become too stale, and pins it; returns the reason."""
        versions = visit.versions or (visit.granted or START,)
        reason = f"expired: sampled from {min(versions)} on, too stale at {self._track.current}"
        visit.pinned = True
        self.give_back(visit, reason)
        return reason

    def expire_outdated(self) -> None:
        """Ends the leases, and sends back the scored groups, that the current version has left behind."""
        for visit in self._book.visits(VisitState.SCORED):
            if self.staleness(visit) > self._config.max_staleness:
                self.expire(visit)
        for visit in self._book.visits(VisitState.LEASED):
            if self.lease_staleness(visit) > self._config.max_staleness:
                self.expire(visit)

    def ungraded(self, visit: Visit, scored: wire.ScoredGroup) -> str:
        """Gives back a visit with too few grades, once; returns the reason."""
        reason = f"{num_graded(scored.grades)} of {len(scored.grades)} completions graded, expected {MIN_GRADED}"
        if visit.returned:
            self._book.move(visit, VisitState.QUARANTINED, f"{reason}, for the second time")
        else:
            visit.returned = True
            self.give_back(visit, reason)
        return reason
