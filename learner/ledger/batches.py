"""Which scored groups make the next batch, and in which order a batch is trained."""

from collections.abc import Callable, Iterable

from learner.ledger.visits import Visit


def first_to_train(visits: Iterable[Visit], staleness: Callable[[Visit], int]) -> list[Visit]:
    """Those of steps that a resume undid, step by step, so that each is repeated with its groups; then the others."""
    return sorted(most_stale_first(visits, staleness), key=_undone_step)


def most_stale_first(visits: Iterable[Visit], staleness: Callable[[Visit], int]) -> list[Visit]:
    """The order within a batch; it is the same when the batch is asked for again, and when its step is repeated."""
    return sorted(visits, key=lambda visit: (-staleness(visit), visit.number))


def _undone_step(visit: Visit) -> tuple[bool, int]:
    return (True, 0) if visit.step is None else (False, visit.step.number)
