"""A fleet in simulated time: it takes leases from the real state machine, and a learner trains what comes back."""

import heapq
import itertools
import random
from typing import NamedTuple

from common.config import Config
from common.learning import LossConfig
from common.sections import LeaseConfig
from common.versions import Version
from common.wire import LeaseKey, VisitState
from learner.ledger.order import DataOrder, PromptRange
from learner.ledger.state import Ledger
from tests.learner.ledger.rules import scored_group

NUM_PROMPTS = 50
LONG_SHARE = 0.1
STEPS = 200
LONG_FACTOR = 50


class Times(NamedTuple):
    """How fast everyone is: a short group takes about a second."""

    num_slots: int  # groups that the fleet works on at once
    step_s: float
    load_s: float  # from a commit to the engines' next version


class Trained(NamedTuple):
    """A visit that was trained: when it was handed out and trained, in steps."""

    visit: int
    is_long: bool
    handed_out: int
    step: int


class Simulation:
    """A run without processes: one prompt in ten answers 50 times longer than the rest."""

    def __init__(self, config: Config, times: Times, *, seed: int, pins: bool = True) -> None:
        order = DataOrder([PromptRange(0, NUM_PROMPTS, 1.0)], seed=seed, shuffle=True)
        self.config, self.times, self._pins = config, times, pins
        self.ledger = Ledger(config, lambda position: (order.prompt(position), ""))
        self.trained: list[Trained] = []
        self.num_expired = self.max_attempts = 0
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, LeaseKey | None, Version]] = []
        self._ties = itertools.count()
        self._at_work: set[LeaseKey] = set()
        self.handed_out: dict[int, int] = {}
        self._now = self._published_at = 0.0
        self._engine = self.ledger.begin(None)

    @property
    def now(self) -> float:
        """Seconds since the run began."""
        return self._now

    @property
    def version(self) -> Version:
        assert self.ledger.track.current is not None
        return self.ledger.track.current

    def run(self, num_steps: int) -> None:
        """So many steps. Fails where nothing would ever happen again."""
        while self.version.number < num_steps:
            self._grant()
            is_stepping = bool(self.ledger.visits(VisitState.RESERVED))
            if not is_stepping and self.ledger.reserve(self.version, self.config.groups_per_step):
                self._push(self.times.step_s, None, self.version)
            assert self._events, f"a standstill at {self.version}: {self.ledger.accounts()}"
            self._now, _, key, version = heapq.heappop(self._events)
            if key is None:
                self._step(version)
            elif key in self._at_work:
                self._at_work.remove(key)
                self.ledger.store(scored_group(key, (version,), (1.0, 0.0)), b"")

    def _grant(self) -> None:
        if self._engine != self.version and self._now >= self._published_at + self.times.load_s:
            self._engine = self.version
        room = self.times.num_slots - len(self._at_work)
        for visit in self.ledger.grant("g", self._engine, room, self._now):
            seconds = self._random.uniform(0.5, 1.5) * (LONG_FACTOR if is_long(visit.prompt) else 1)
            self._at_work.add(visit.key)
            self.handed_out.setdefault(visit.number, self.version.number)
            self.max_attempts = max(self.max_attempts, visit.attempt)
            self._push(seconds, visit.key, self._engine)

    def _step(self, version: Version) -> None:
        if version != self.version:
            return  # an engine has loaded
        batch = self.ledger.visits(VisitState.RESERVED)
        assert all(self.ledger.track.staleness(v) <= self.config.max_staleness for b in batch for v in b.versions)
        self.ledger.commit(version, tuple(visit.number for visit in batch))
        self.trained += [Trained(v.number, is_long(v.prompt), self.handed_out[v.number], version.number) for v in batch]
        expired = [v for v in self.ledger.visits(VisitState.WAITING) if "expired" in v.reason]
        self.num_expired += len(expired)
        for visit in expired:
            visit.pinned = self._pins
        self._published_at = self._now
        self._push(self.times.load_s, None, version)
        self._at_work -= set(self.ledger.beat("g", tuple(self._at_work), self._now))

    def _push(self, seconds: float, key: LeaseKey | None, version: Version) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._ties), key, version))


def simulation_config(max_staleness: int, groups_per_step: int) -> Config:
    return Config(
        group_size=2,
        groups_per_step=groups_per_step,
        updates_per_step=1,
        max_staleness=max_staleness,
        lease=LeaseConfig(heartbeat_timeout_s=604_800, completion_timeout_s=604_800, max_attempts=8),
        loss=LossConfig(filter_uniform=False),
    )


def is_long(prompt: int) -> bool:
    return prompt < NUM_PROMPTS * LONG_SHARE


def wait_bound(max_staleness: int) -> int:
    """Steps from the one in which a visit is handed out to the last one that may train it, where no attempt fails.

    Its first lease ends with its window, after eta + 1 steps at most. While it waits in front no new visit is handed
    out, so the at most (eta + 1) * groups_per_step under way become fewer by groups_per_step a step: it is granted
    again within eta steps, and trained within the eta + 1 of its new window.
    """
    return 3 * max_staleness + 1


def share(simulation: Simulation) -> float:
    """Of long groups among those trained in the last `STEPS` steps."""
    last = [t for t in simulation.trained if t.step >= simulation.version.number - STEPS]
    assert len(last) == STEPS * simulation.config.groups_per_step
    return sum(t.is_long for t in last) / len(last)
