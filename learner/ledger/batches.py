"""Which scored visits a step takes, in which order, and which leased ones it waits for."""

from collections.abc import Iterable

from common.config import Config
from common.wire import VisitState
from learner.ledger.book import Book
from learner.ledger.returns import Returns
from learner.ledger.visits import Visit


class Batches:
    """The choice of batches.

    A step that a resume undid is repeated with its groups. Else the most stale go first, so that few expire; and one
    that has expired once, a pinned one, never does again. A pinned visit with slack k may be in the current step or in
    one of the k after it. A step takes `groups_per_step`, so it may leave behind at most k * groups_per_step pinned
    visits of slack k or less, for every k. The budget of leases admits no more than that, so a batch that keeps the
    rule is there once the pinned visits are scored; until then the learner waits. What this does not do: after a resume
    from a checkpoint there may be more scored visits than steps before they expire, and some expire again.
    """

    def __init__(self, config: Config, book: Book, returns: Returns) -> None:
        """All three are shared with the ledger."""
        self._config, self._book, self._returns = config, book, returns

    def next(self) -> list[Visit]:
        """The scored visits for the next step, in order; empty while they are too few or pinned ones are awaited."""
        num_groups = self._config.groups_per_step
        if self._book.count(VisitState.SCORED) < num_groups or self.awaited():
            return []
        scored = self.in_order(self._book.visits(VisitState.SCORED))
        batch = sorted(scored, key=_undone_step)[:num_groups]
        if batch[0].step is None and any(self._crowded(self._left_behind(batch))):
            batch = self._pinned_first()
        return self.in_order(batch)

    def break_up(self, reason: str) -> None:
        """The batch that is reserved is none any more."""
        for visit in self._book.visits(VisitState.RESERVED):
            self._book.move(visit, VisitState.SCORED, f"was in the step from {visit.step}: {reason}")

    def awaited(self) -> list[Visit]:
        """Leased, pinned visits without which the learner does not step: not all pinned ones would find a place.

        One whose window ends at the current version always is.
        """
        if not any(visit.pinned for visit in self._book.visits(VisitState.LEASED)):
            return []
        left = self._left_behind(self._pinned_first())
        leased = [(visit, slack) for visit, slack in left if visit.state is VisitState.LEASED]
        slack = max(self._crowded(left), default=-1)
        return [visit for visit, its in leased if its <= slack]

    def in_order(self, visits: list[Visit]) -> list[Visit]:
        """Stored visits, most stale first, of equals the pinned ones: the same whenever the batch is asked for."""
        return sorted(visits, key=lambda v: (-self._returns.staleness(v), not v.pinned, v.number))

    def _pinned_first(self) -> list[Visit]:
        """The scored visits that leave the fewest pinned ones behind."""
        scored = sorted(self.in_order(self._book.visits(VisitState.SCORED)), key=lambda visit: not visit.pinned)
        return scored[: self._config.groups_per_step]

    def _left_behind(self, batch: list[Visit]) -> list[tuple[Visit, int]]:
        """The pinned visits that a step over `batch` does not take, each with its slack."""
        limit, taken = self._config.max_staleness, {visit.number for visit in batch}
        scored = [(v, limit - self._returns.staleness(v)) for v in self._book.visits(VisitState.SCORED) if v.pinned]
        leased = [
            (v, limit - self._returns.lease_staleness(v)) for v in self._book.visits(VisitState.LEASED) if v.pinned
        ]
        return [(visit, slack) for visit, slack in (*scored, *leased) if visit.number not in taken]

    def _crowded(self, left: list[tuple[Visit, int]]) -> Iterable[int]:
        """For which slacks more are left behind than the steps until then take."""
        slacks = sorted(slack for _, slack in left)
        return [s for i, s in enumerate(slacks) if i + 1 > s * self._config.groups_per_step]


def _undone_step(visit: Visit) -> tuple[bool, int]:
    return (True, 0) if visit.step is None else (False, visit.step.number)
