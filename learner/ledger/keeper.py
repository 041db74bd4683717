"""The state behind the ledger's answers: stored before anyone hears of it, and ended when its time is over."""

import asyncio
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from common import wire
from common.config import Config
from common.errors import RunDirectoryError
from common.log import logger
from common.membership import Activity
from common.wire import Role, VisitState
from learner.ledger.evaluations import EvaluationChanges
from learner.ledger.fleet import Fleet
from learner.ledger.held import HeldRequests, Topic
from learner.ledger.overlap import Overlap
from learner.ledger.store import Store
from learner.ledger.visits import Changes

TICK_S = 0.5
LATE_S = 1.0
LOG_S = 1.0
MAX_LOG_BYTES = 64 << 20
_REVISIONS = 1 << 32
_OPEN = (VisitState.LEASED, VisitState.SCORED, VisitState.RESERVED)


class Keeper:
    """All that the ledger knows.

    All changes happen inside `stored` blocks, which do not await: requests cannot see each other's halves.

    Attributes:
        clock: Says the seconds since the epoch.
        store: The run's file.
        config: Of the run.
        ledger: The training visits.
        evaluations: The held-out ones.
        epochs: How often the prompts have been visited.
        fleet: Who is in the run.
        overlap: Who worked when.
        manifest: Of the newest published version; None before the first.
        revision: Of the directory.
        held: Requests that wait.
        activity: When the ledger itself worked.
        failed: Set with the error when the file cannot be used any more: nothing may be answered after that.
    """

    def __init__(
        self, store: Store, config: Config, *, incarnation: int, clock: Callable[[], float] = time.time
    ) -> None:
        """State as it was stored; `incarnation` is how often the ledger has started."""
        self.clock = clock
        now = clock()
        self.store, self.config = store, config
        self.ledger = store.ledger(config, now)
        self.evaluations = store.evaluations(config, now)
        self.epochs = store.epochs()
        self.fleet = Fleet(store.members(), now)
        self.overlap = Overlap()
        self.manifest = store.manifest()
        self.revision = incarnation * _REVISIONS
        self._directory: wire.Directory | None = None
        self._syncing = asyncio.Lock()
        self.held = HeldRequests()
        self.activity = Activity(clock)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @contextmanager
    def stored(self) -> Generator[None]:
        """What changes in the block is stored when it ends, and those whom it concerns look again."""
        with self.activity.working():
            yield
            changes, evaluations = self.ledger.drain(), self.evaluations.drain()
            self.store.save(changes, evaluations)
            self._wake(changes, evaluations)
            self._name_quarantined(changes)

    async def sync(self) -> None:
        """What is stored by now survives the loss of the machine; others are answered meanwhile.

        Raises:
            RunDirectoryError: The disk fails.
        """
        async with self._syncing:  # what another call has begun to sync is not on the disk before it ends
            await asyncio.to_thread(self.store.sync())

    async def keep_log_short(self) -> None:
        """Moves what is stored from the log into the file, beside all else, until cancelled."""
        move = self.store.keep_log_short()
        try:
            while True:
                await asyncio.sleep(LOG_S)
                if await asyncio.to_thread(move) > MAX_LOG_BYTES:
                    self.store.cut_log()
        except RunDirectoryError as error:
            self.fail(error)

    def directory(self) -> wire.Directory:
        """What everyone may know."""
        if self._directory is None or self._directory.revision != self.revision:
            self._directory = wire.Directory(
                revision=self.revision,
                manifest=self.manifest,
                verifiers=self.fleet.endpoints(),
                closing=bool(self.ledger.closing),
            )
        return self._directory

    def revise(self) -> None:
        """The directory has changed."""
        self.revision += 1
        self.held.wake(Topic.DIRECTORY)

    def fail(self, error: RunDirectoryError) -> None:
        """The file cannot be used: the process ends."""
        if not self.failed.done():
            self.failed.set_exception(error)

    async def keep_time(self) -> None:
        """Ends what is overdue, until cancelled; after a standstill of the ledger, others first get time to beat."""
        timeout_s, last, patience = self.config.lease.heartbeat_timeout_s, self.clock(), 0.0
        while True:
            await asyncio.sleep(TICK_S)
            now = self.clock()
            busy_s = sum(span.end - span.start for span in self.activity.take().busy)
            self.overlap.add(Role.LEDGER, wire.Span(now - busy_s, now))
            if now - last > TICK_S + LATE_S:
                patience = now + timeout_s
                logger().warning("ledger_stood_still", seconds=round(now - last, 1))
            last = now
            if now >= patience:
                self._end_overdue(now, timeout_s)

    def _end_overdue(self, now: float, timeout_s: float) -> None:
        with self.stored():
            num_ended = self.ledger.expire(now) + self.evaluations.expire(now)
        if num_ended:
            logger().warning("leases_ended", num_leases=num_ended)
        for process in self.fleet.remove_silent(now, timeout_s):
            self.store.drop_member(process.name)
            self.revise()
            logger().warning("member_lost", member=process.name, silent_s=round(now - process.heard_at, 1))

    def _name_quarantined(self, changes: Changes) -> None:
        for visit in changes.visits:
            if visit.state is VisitState.QUARANTINED:
                prompt = self.store.prompt(visit.prompt).id
                logger().warning("prompt_quarantined", visit=visit.number, prompt=prompt, reason=visit.reason)

    def _wake(self, changes: Changes, evaluations: EvaluationChanges) -> None:
        if any(visit.state not in _OPEN for visit in changes.visits) or any(v.is_free for v in evaluations.visits):
            self.held.wake(Topic.LEASES)
        if any(visit.state is not VisitState.LEASED for visit in changes.visits):
            self.held.wake(Topic.BATCH)
        if evaluations.finished or evaluations.dropped:
            self.held.wake(Topic.EVALUATIONS)
