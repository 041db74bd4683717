"""The ledger's answers: each request becomes one call of the state machine, stored before it is answered."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any

from common import wire
from common.config import Config
from common.errors import RefusedError, RunDirectoryError
from common.log import logger
from common.membership import Activity
from common.wire import Role, VisitState
from learner.ledger.evaluations import EvaluationChanges
from learner.ledger.fleet import Fleet
from learner.ledger.held import HeldRequests, Topic
from learner.ledger.leases import evaluation_lease, training_lease
from learner.ledger.overlap import Overlap
from learner.ledger.store import Store
from learner.ledger.visits import Changes
from learner.ledger.waits import batch_waits_for, evaluation_waits_for, lease_waits_for, run_waits_for

TICK_S = 0.5
LATE_S = 1.0
_REVISIONS = 1 << 32
_OPEN = (VisitState.LEASED, VisitState.SCORED, VisitState.RESERVED)


class LedgerService:
    """The handler of a `common.transport.Service`, with the state behind it.

    All state changes happen inside `_stored` blocks, which do not await: requests cannot see each other's halves.

    Attributes:
        failed: Set with the error when the file cannot be written any more: nothing may be answered after that.
    """

    def __init__(self, store: Store, config: Config, *, run: str, incarnation: int) -> None:
        """State as it was stored.

        Args:
            store: The run's file.
            config: Of the run.
            run: The run's public key.
            incarnation: How often the ledger has started.
        """
        now = time.time()
        self._store, self._config, self._run, self._incarnation = store, config, run, incarnation
        self._ledger = store.ledger(config, now)
        self._evaluations = store.evaluations(config, now)
        self._fleet = Fleet(store.members(), now)
        self._manifest = store.manifest()
        self._overlap = Overlap()
        self._activity = Activity()
        self._revision = incarnation * _REVISIONS
        self._held = HeldRequests()
        self._lease_requests: dict[str, wire.LeaseRequest] = {}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._handlers: dict[type, Callable[[Any], Awaitable[wire.Answer]]] = {
            wire.Hello: self._hello,
            wire.Beat: self._beat,
            wire.Watch: self._watch,
            wire.LeaseRequest: self._lease,
            wire.ScoredGroup: self._score,
            wire.Begin: self._begin,
            wire.Reserve: self._reserve,
            wire.Commit: self._commit,
            wire.Publish: self._publish,
            wire.Checkpoint: self._checkpoint,
            wire.Evaluate: self._evaluate,
            wire.Finish: self._finish,
            wire.Status: self._status,
        }

    async def handle(self, peer: bytes, request: wire.Request) -> wire.Answer:
        """The answer to a request.

        Raises:
            RefusedError: It is no request to a ledger, or the state does not allow it.
        """
        handler = self._handlers.get(type(request))
        if handler is None:
            raise RefusedError(f"found {type(request).__name__} from {peer.hex()}, expected a request to a ledger")
        if not self.failed.done():
            try:
                return await handler(request)
            except RunDirectoryError as error:
                self._fail(error)
        return await asyncio.Future()  # the process ends; whoever starts in its place answers

    async def keep_time(self) -> None:
        """Ends what is overdue, until cancelled; after a standstill of the ledger, others first get time to beat."""
        timeout_s, last, patience = self._config.lease.heartbeat_timeout_s, time.time(), 0.0
        while True:
            await asyncio.sleep(TICK_S)
            now = time.time()
            busy_s = sum(span.end - span.start for span in self._activity.take().busy)
            self._overlap.add(Role.LEDGER, wire.Span(now - busy_s, now))
            if now - last > TICK_S + LATE_S:
                patience = now + timeout_s
                logger().warning("ledger_stood_still", seconds=round(now - last, 1))
            last = now
            if now >= patience:
                self._end_overdue(now, timeout_s)

    def _end_overdue(self, now: float, timeout_s: float) -> None:
        with self._stored():
            num_ended = self._ledger.expire(now) + self._evaluations.expire(now)
        if num_ended:
            logger().warning("leases_ended", num_leases=num_ended)
        for process in self._fleet.remove_silent(now, timeout_s):
            self._store.drop_member(process.name)
            self._revise()
            logger().warning("member_lost", member=process.name, silent_s=round(now - process.heard_at, 1))

    # Everyone

    async def _hello(self, hello: wire.Hello) -> wire.Welcome:
        if hello.run != self._run or hello.protocol != wire.PROTOCOL:
            raise RefusedError(
                f"found {hello.name} of run {hello.run[:8]}, protocol {hello.protocol}, "
                f"expected run {self._run[:8]}, protocol {wire.PROTOCOL}"
            )
        self._lease_requests.pop(hello.name, None)
        with self._stored():
            num_freed = self._ledger.free(hello.name) + self._evaluations.free(hello.name)
            self._fleet.join(hello, time.time())
            self._store.save_member(hello.name, hello.role.value, hello.endpoint)
        logger().info("member_joined", member=hello.name, freed=num_freed)
        self._held.wake(Topic.LEASES)
        if hello.role is Role.VERIFIER:
            self._revise()
        return wire.Welcome(incarnation=self._incarnation)

    async def _beat(self, beat: wire.Beat) -> wire.BeatAnswer:
        now = time.time()
        with self._activity.working():
            if not self._fleet.beat(beat, now):
                return wire.BeatAnswer(cancelled=(), known=False)
            if beat.stats is not None and beat.role is not Role.LEARNER:
                for span in beat.stats.busy:
                    self._overlap.add(beat.role, span)
            training = tuple(key for key in beat.holds if not key.is_evaluation)
            evaluation = tuple(key for key in beat.holds if key.is_evaluation)
            cancelled = self._ledger.beat(beat.name, training, now)
            return wire.BeatAnswer(cancelled=cancelled + self._evaluations.beat(beat.name, evaluation, now), known=True)

    async def _watch(self, watch: wire.Watch) -> wire.Directory:
        def directory() -> wire.Directory:
            return wire.Directory(
                revision=self._revision,
                manifest=self._manifest,
                verifiers=self._fleet.endpoints(),
                closing=bool(self._ledger.closing),
            )

        changed = await self._held.wait(
            Topic.DIRECTORY, lambda: directory() if self._revision != watch.revision else None
        )
        return changed or directory()

    async def _status(self, status: wire.Status) -> wire.StatusReport:
        now = time.time()
        overlap_share, busy_shares = self._overlap.shares(now)
        return wire.StatusReport(
            version=self._ledger.track.current,
            members=self._fleet.members(now),
            accounts=self._ledger.accounts(),
            evaluations=tuple(self._evaluations.finished[max(0, status.num_evaluations) :]),
            overlap_share=overlap_share,
            busy_shares=busy_shares,
            waiting_for=run_waits_for(self._config, self._ledger, self._evaluations, self._fleet, self._manifest),
        )

    # Generators and verifiers

    async def _lease(self, request: wire.LeaseRequest) -> wire.Leases:
        if not self._ledger.track.knows(request.version):
            raise RefusedError(f"found an engine at {request.version}, expected a lineage that has begun")
        self._lease_requests[request.name] = request
        newest = self._manifest

        def answer() -> wire.Leases | None:
            if self._lease_requests.get(request.name) is not request:
                return wire.Leases(leases=(), waiting_for="nothing: the generator has asked anew")
            if leases := self._grant(request):
                return wire.Leases(leases=leases)
            return wire.Leases(leases=(), waiting_for=self._why_no_lease(request)) if self._manifest != newest else None

        leases = await self._held.wait(Topic.LEASES, answer)
        return leases or wire.Leases(leases=(), waiting_for=self._why_no_lease(request))

    def _grant(self, request: wire.LeaseRequest) -> tuple[wire.Lease, ...]:
        """Evaluations first, then training."""
        if request.name not in self._fleet:
            return ()
        now, room = time.time(), max(0, request.room)
        with self._stored():
            evaluations = self._evaluations.grant(request.name, request.version, room, now)
            visits = self._ledger.grant(request.name, request.version, room - len(evaluations), now)
        return (
            *(evaluation_lease(self._store, self._config, visit) for visit in evaluations),
            *(training_lease(self._store, self._config, visit) for visit in visits),
        )

    def _why_no_lease(self, request: wire.LeaseRequest) -> str:
        if request.name not in self._fleet:
            return f"a hello from {request.name}"
        current = self._ledger.track.current
        behind = 0 if current is None else self._ledger.track.staleness(request.version)
        return lease_waits_for(self._config, self._ledger, behind)

    async def _score(self, scored: wire.ScoredGroup) -> wire.Verdict:
        with self._stored():
            if scored.group.key.is_evaluation:
                verdict = self._evaluations.store(scored, len(self._ledger.track.lineages.branches))
            else:
                verdict = self._ledger.store(scored, wire.encode(scored))
        if verdict.status == "refused":
            logger().warning("group_refused", visit=scored.group.key.visit, reason=verdict.reason)
        return verdict

    # The learner

    async def _begin(self, begin: wire.Begin) -> wire.Begun:
        with self._stored():
            version = self._ledger.begin(begin.checkpoint)
            self._evaluations.abandon(v for v in self._evaluations.versions() if self._ledger.track.includes(v))
        self._overlap.drop_step()
        self._revise()
        self._held.wake(Topic.LEASES)
        logger().info("learner_began", version=str(version), checkpoint=str(begin.checkpoint or ""))
        return wire.Begun(version=version, branches=self._ledger.track.lineages.branches)

    async def _reserve(self, reserve: wire.Reserve) -> wire.Batch:
        if groups := await self._held.wait(Topic.BATCH, lambda: self._batch(reserve)):
            self._overlap.begin_step(time.time())
            return wire.Batch(version=reserve.version, groups=groups)
        waiting_for = batch_waits_for(self._config, self._ledger, self._fleet)
        return wire.Batch(version=reserve.version, groups=(), waiting_for=waiting_for or "its turn")

    def _batch(self, reserve: wire.Reserve) -> tuple[wire.TrainingGroup, ...]:
        with self._stored():
            visits = self._ledger.reserve(reserve.version, reserve.num_groups)
        return tuple(
            wire.TrainingGroup(prompt=self._store.prompt(v.prompt), scored=self._store.payload(v.number))
            for v in visits
        )

    async def _commit(self, commit: wire.Commit) -> wire.Done:
        with self._stored():
            version = self._ledger.commit(commit.version, commit.visits)
        self._overlap.end_step(time.time())
        logger().info("step_committed", version=str(version), num_groups=len(commit.visits))
        return wire.Done()

    async def _publish(self, publish: wire.Publish) -> wire.Done:
        manifest = publish.manifest
        if not self._ledger.track.includes(manifest.version):
            raise RefusedError(
                f"found {manifest.version} published, expected a version up to {self._ledger.track.current}"
            )
        if self._manifest is None or manifest.version >= self._manifest.version:
            with self._stored():
                self._store.save_manifest(manifest)
            self._manifest = manifest
            self._revise()
            self._held.wake(Topic.LEASES)
            logger().info("version_published", version=str(manifest.version), size_bytes=manifest.size_bytes)
        return wire.Done()

    async def _checkpoint(self, checkpoint: wire.Checkpoint) -> wire.Done:
        with self._stored():
            self._ledger.checkpoint(checkpoint.version)
        return wire.Done()

    async def _evaluate(self, evaluate: wire.Evaluate) -> wire.Done:
        if not self._ledger.track.includes(evaluate.version):
            raise RefusedError(
                f"found an evaluation of {evaluate.version}, expected one up to {self._ledger.track.current}"
            )
        with self._stored():
            self._evaluations.ask(evaluate.version, time.time())
        return wire.Done()

    async def _finish(self, finish: wire.Finish) -> wire.Finished:
        if not self._ledger.closing:
            with self._stored():
                self._ledger.finish(finish.reason)
            self._revise()
            logger().info("run_closing", reason=finish.reason)
        done = await self._held.wait(Topic.EVALUATIONS, lambda: self._evaluations.num_pending == 0)
        return wire.Finished(
            done=bool(done),
            accounts=self._ledger.accounts(),
            waiting_for="" if done else evaluation_waits_for(self._evaluations, self._fleet),
        )

    # Storing and waking

    @contextmanager
    def _stored(self) -> Generator[None]:
        """What changes in the block is stored when it ends, and those whom it concerns look again."""
        with self._activity.working():
            yield
            changes, evaluations = self._ledger.drain(), self._evaluations.drain()
            self._store.save(changes, evaluations)
            self._wake(changes, evaluations)

    def _wake(self, changes: Changes, evaluations: EvaluationChanges) -> None:
        if any(visit.state not in _OPEN for visit in changes.visits) or any(v.is_free for v in evaluations.visits):
            self._held.wake(Topic.LEASES)
        if any(visit.state is not VisitState.LEASED for visit in changes.visits):
            self._held.wake(Topic.BATCH)
        if evaluations.finished or evaluations.dropped:
            self._held.wake(Topic.EVALUATIONS)

    def _revise(self) -> None:
        self._revision += 1
        self._held.wake(Topic.DIRECTORY)

    def _fail(self, error: RunDirectoryError) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)
