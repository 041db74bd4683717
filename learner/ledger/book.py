"""The book of visits: which are in which state, and what has to be stored of it."""

from collections.abc import Iterable

from common.wire import VisitState
from learner.ledger.visits import ENDED, Changes, Head, Visit

_STATES = tuple(VisitState)
_WITH_STEP = (VisitState.SCORED, VisitState.RESERVED, VisitState.TRAINED)


class Book:
    """All visits by state. A visit that has ended leaves memory: one byte of it remains."""

    def __init__(self, num_visits: int, live: Iterable[Visit], ended: Iterable[tuple[int, VisitState]]) -> None:
        """`live` and `ended` are the `num_visits` visits handed out so far."""
        self._in: dict[VisitState, dict[int, Visit]] = {state: {} for state in VisitState}
        self._ended = bytearray(num_visits)
        self._num_ended = dict.fromkeys(VisitState, 0)
        for visit in live:
            self._in[visit.state][visit.number] = visit
        for number, state in ended:
            self._end(number, state)
        self._dirty: dict[int, Visit] = {}
        self._payloads: dict[int, bytes] = {}
        self._freed: set[int] = set()

    @property
    def num_visits(self) -> int:
        """Visits handed out."""
        return len(self._ended)

    def accounts(self) -> dict[str, int]:
        """How many visits are in each state; the sum is the visits handed out."""
        return {state.value: len(self._in[state]) + self._num_ended[state] for state in VisitState}

    def count(self, *states: VisitState) -> int:
        """How many visits are in these states and have not ended."""
        return sum(len(self._in[state]) for state in states)

    def visits(self, state: VisitState) -> list[Visit]:
        """The visits in a state that have not ended, by number."""
        return [self._in[state][number] for number in sorted(self._in[state])]

    def find(self, state: VisitState, number: int) -> Visit | None:
        """A visit, if it is in this state and has not ended."""
        return self._in[state].get(number)

    def state_of(self, number: int) -> VisitState:
        """The state of a visit that was handed out."""
        code = self._ended[number]
        return _STATES[code - 1] if code else next(state for state in VisitState if number in self._in[state])

    def open(self, prompt: int) -> Visit:
        """The next visit; it counts once it is moved to a state."""
        visit = Visit(number=self.num_visits, prompt=prompt)
        self._ended.append(0)
        return visit

    def move(self, visit: Visit, state: VisitState, reason: str, *, payload: bytes | None = None) -> None:
        """Changes the state of a visit; its payload goes where the state has none, and comes with one where it has."""
        self._in[visit.state].pop(visit.number, None)
        visit.state, visit.reason = state, reason
        if state is not VisitState.LEASED:
            visit.holder = ""
        if state not in _WITH_STEP:
            visit.step = None
        self._dirty[visit.number] = visit
        if payload is not None:
            self._payloads[visit.number] = payload
        if state in ENDED:
            self._end(visit.number, state)
        else:
            self._in[state][visit.number] = visit
        if state is VisitState.WAITING or state in ENDED:
            self._free(visit.number)

    def conclude(self, visit: Visit) -> None:
        """A trained visit that no resume can undo: its payload goes, and it leaves memory."""
        del self._in[visit.state][visit.number]
        self._end(visit.number, visit.state)
        self._free(visit.number)

    def drain(self, head: Head | None) -> Changes:
        """What changed since the last call, with the head where it changed."""
        changes = Changes(head, list(self._dirty.values()), self._payloads, self._freed)
        self._dirty, self._payloads, self._freed = {}, {}, set()
        return changes

    def _end(self, number: int, state: VisitState) -> None:
        self._ended[number] = 1 + _STATES.index(state)
        self._num_ended[state] += 1

    def _free(self, number: int) -> None:
        self._payloads.pop(number, None)
        self._freed.add(number)
