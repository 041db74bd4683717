"""How much of the run each role worked, and how much generators and learner worked at the same time."""

from bisect import insort
from collections import defaultdict

from common.wire import Role, Span

_SETTLED_AFTER_S = 30.0


class Overlap:
    """Busy time by role since the first step began; several processes of a role count once.

    Spans may come late and in any order; what is older than 30 s is summed up and forgotten, and later news of it is
    not counted. A restart of the ledger begins anew.
    """

    def __init__(self) -> None:
        """Nothing counts before `begin_step`."""
        self._start: float | None = None
        self._settled = 0.0
        self._step_from: float | None = None
        self._spans: dict[Role, list[Span]] = defaultdict(list)
        self._busy: dict[Role, float] = defaultdict(float)
        self._both = 0.0

    def begin_step(self, now: float) -> None:
        """The learner has its batch."""
        if self._start is None:
            self._start = self._settled = now
        if self._step_from is None:
            self._step_from = now

    def end_step(self, now: float) -> None:
        """The learner has committed the step."""
        if self._step_from is not None:
            self.add(Role.LEARNER, Span(self._step_from, now))
        self._step_from = None

    def drop_step(self) -> None:
        """The learner has begun anew: what it did since its batch is unknown."""
        self._step_from = None

    def add(self, role: Role, span: Span) -> None:
        """A process of the role was busy."""
        if self._start is not None and span.end > max(span.start, self._settled):
            insort(self._spans[role], Span(max(span.start, self._settled), span.end))

    def shares(self, now: float) -> tuple[float, dict[str, float]]:
        """Share of the time since the first step in which generators and learner worked at once; and by role."""
        if self._start is None or now <= self._start:
            return 0.0, {}
        open_step = Span(now, now) if self._step_from is None else Span(self._step_from, now)
        self._settle(now - _SETTLED_AFTER_S)
        merged = {role: merge(spans) for role, spans in self._spans.items()}
        merged[Role.LEARNER] = merge([*merged.get(Role.LEARNER, []), Span(max(open_step.start, self._settled), now)])
        both = self._both + _length(intersect(merged[Role.LEARNER], merged.get(Role.GENERATOR, [])))
        seconds = now - self._start
        busy = {role.value: min(1.0, (self._busy[role] + _length(spans)) / seconds) for role, spans in merged.items()}
        return min(1.0, both / seconds), busy

    def _settle(self, until: float) -> None:
        """Sums up what lies before `until`; an open step is settled only once it is over."""
        if self._step_from is not None:
            until = min(until, self._step_from)
        if until <= self._settled:
            return
        before = {role: merge(_clip(spans, end=until)) for role, spans in self._spans.items()}
        for role, spans in before.items():
            self._busy[role] += _length(spans)
            self._spans[role] = _clip(self._spans[role], start=until)
        self._both += _length(intersect(before.get(Role.LEARNER, []), before.get(Role.GENERATOR, [])))
        self._settled = until


def merge(spans: list[Span]) -> list[Span]:
    """The union of spans: disjoint, in order."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def intersect(left: list[Span], right: list[Span]) -> list[Span]:
    """What two lists of disjoint spans, each in order, have in common."""
    common: list[Span] = []
    i = j = 0
    while i < len(left) and j < len(right):
        span = Span(max(left[i].start, right[j].start), min(left[i].end, right[j].end))
        if span.start < span.end:
            common.append(span)
        if left[i].end < right[j].end:
            i += 1
        else:
            j += 1
    return common


def _clip(spans: list[Span], *, start: float = float("-inf"), end: float = float("inf")) -> list[Span]:
    return [Span(max(s.start, start), min(s.end, end)) for s in spans if s.end > start and s.start < end]


def _length(spans: list[Span]) -> float:
    return sum(span.end - span.start for span in spans)
