"""The ledger's answers: each request becomes one call of the state machine, stored before it is answered."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from common import wire
from common.config import Config
from common.errors import RefusedError, RunDirectoryError
from common.log import logger
from common.wire import Role
from learner.ledger.held import Topic
from learner.ledger.judgement import ALL_RIGHT, ALL_WRONG
from learner.ledger.keeper import Keeper
from learner.ledger.leases import evaluation_lease, training_lease
from learner.ledger.store import Store
from learner.ledger.waits import batch_waits_for, evaluation_waits_for, lease_waits_for, run_waits_for


class LedgerService:
    """The handler of a `common.transport.Service`.

    Attributes:
        keeper: The state behind it.
    """

    def __init__(self, store: Store, config: Config, *, run: str, incarnation: int) -> None:
        """State as it was stored.

        Args:
            store: The run's file.
            config: Of the run.
            run: The run's public key.
            incarnation: How often the ledger has started.
        """
        self.keeper = Keeper(store, config, incarnation=incarnation)
        self._run, self._incarnation = run, incarnation
        self._lease_requests: dict[str, wire.LeaseRequest] = {}
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
        if not self.keeper.failed.done():
            try:
                return await handler(request)
            except RunDirectoryError as error:
                self.keeper.fail(error)
        return await asyncio.Future()  # the process ends; whoever starts in its place answers

    # Everyone

    async def _hello(self, hello: wire.Hello) -> wire.Welcome:
        if hello.run != self._run or hello.protocol != wire.PROTOCOL:
            raise RefusedError(
                f"found {hello.name} of run {hello.run[:8]}, protocol {hello.protocol}, "
                f"expected run {self._run[:8]}, protocol {wire.PROTOCOL}"
            )
        self._lease_requests.pop(hello.name, None)
        with self.keeper.stored():
            num_freed = self.keeper.ledger.free(hello.name) + self.keeper.evaluations.free(hello.name)
            self.keeper.fleet.join(hello, time.time())
            self.keeper.store.save_member(hello.name, hello.role.value, hello.endpoint)
        logger().info("member_joined", member=hello.name, freed=num_freed)
        self.keeper.held.wake(Topic.LEASES)
        if hello.role is Role.VERIFIER:
            self.keeper.revise()
        return wire.Welcome(incarnation=self._incarnation)

    async def _beat(self, beat: wire.Beat) -> wire.BeatAnswer:
        now = time.time()
        with self.keeper.activity.working():
            if not self.keeper.fleet.beat(beat, now):
                return wire.BeatAnswer(cancelled=(), known=False)
            if beat.stats is not None and beat.role is not Role.LEARNER:
                for span in beat.stats.busy:
                    self.keeper.overlap.add(beat.role, span)
            training = tuple(key for key in beat.holds if not key.is_evaluation)
            evaluation = tuple(key for key in beat.holds if key.is_evaluation)
            cancelled = self.keeper.ledger.beat(beat.name, training, now)
            return wire.BeatAnswer(
                cancelled=cancelled + self.keeper.evaluations.beat(beat.name, evaluation, now), known=True
            )

    async def _watch(self, watch: wire.Watch) -> wire.Directory:
        def directory() -> wire.Directory:
            return wire.Directory(
                revision=self.keeper.revision,
                manifest=self.keeper.manifest,
                verifiers=self.keeper.fleet.endpoints(),
                closing=bool(self.keeper.ledger.closing),
            )

        changed = await self.keeper.held.wait(
            Topic.DIRECTORY, lambda: directory() if self.keeper.revision != watch.revision else None
        )
        return changed or directory()

    async def _status(self, status: wire.Status) -> wire.StatusReport:
        now = time.time()
        overlap_share, busy_shares = self.keeper.overlap.shares(now)
        filtered = self.keeper.store.filtered()
        return wire.StatusReport(
            version=self.keeper.ledger.track.current,
            members=self.keeper.fleet.members(now),
            accounts=self.keeper.ledger.accounts(),
            filtered_right=filtered.get(ALL_RIGHT, 0),
            filtered_wrong=filtered.get(ALL_WRONG, 0),
            evaluations=tuple(self.keeper.evaluations.finished[max(0, status.num_evaluations) :]),
            overlap_share=overlap_share,
            busy_shares=busy_shares,
            waiting_for=run_waits_for(
                self.keeper.config, self.keeper.ledger, self.keeper.evaluations, self.keeper.fleet, self.keeper.manifest
            ),
        )

    # Generators and verifiers

    async def _lease(self, request: wire.LeaseRequest) -> wire.Leases:
        if not self.keeper.ledger.track.knows(request.version):
            raise RefusedError(f"found an engine at {request.version}, expected a lineage that has begun")
        self._lease_requests[request.name] = request
        newest = self.keeper.manifest

        def answer() -> wire.Leases | None:
            if self._lease_requests.get(request.name) is not request:
                return wire.Leases(leases=(), waiting_for="nothing: the generator has asked anew")
            if leases := self._grant(request):
                return wire.Leases(leases=leases)
            if self.keeper.manifest != newest:  # load it first: held on at the old version, it would miss its places
                return wire.Leases(leases=(), waiting_for=self._why_no_lease(request))
            return None

        leases = await self.keeper.held.wait(Topic.LEASES, answer)
        return leases or wire.Leases(leases=(), waiting_for=self._why_no_lease(request))

    def _grant(self, request: wire.LeaseRequest) -> tuple[wire.Lease, ...]:
        """Evaluations first, then training."""
        if request.name not in self.keeper.fleet:
            return ()
        now, room = time.time(), max(0, request.room)
        with self.keeper.stored():
            evaluations = self.keeper.evaluations.grant(request.name, request.version, room, now)
            visits = self.keeper.ledger.grant(request.name, request.version, room - len(evaluations), now)
        return (
            *(evaluation_lease(self.keeper.store, self.keeper.config, visit) for visit in evaluations),
            *(training_lease(self.keeper.store, self.keeper.config, visit) for visit in visits),
        )

    def _why_no_lease(self, request: wire.LeaseRequest) -> str:
        if request.name not in self.keeper.fleet:
            return f"a hello from {request.name}"
        current = self.keeper.ledger.track.current
        behind = 0 if current is None else self.keeper.ledger.track.staleness(request.version)
        return lease_waits_for(self.keeper.config, self.keeper.ledger, behind)

    async def _score(self, scored: wire.ScoredGroup) -> wire.Verdict:
        with self.keeper.stored():
            if scored.group.key.is_evaluation:
                verdict = self.keeper.evaluations.store(scored, len(self.keeper.ledger.track.lineages.branches))
            else:
                verdict = self.keeper.ledger.store(scored, wire.encode(scored))
        if verdict.status != "stored":
            logger().warning(f"group_{verdict.status}", visit=scored.group.key.visit, reason=verdict.reason)
        return verdict

    # The learner

    async def _begin(self, begin: wire.Begin) -> wire.Begun:
        with self.keeper.stored():
            version = self.keeper.ledger.begin(begin.checkpoint, begin.sequence)
            self.keeper.evaluations.abandon(
                v for v in self.keeper.evaluations.versions() if self.keeper.ledger.track.includes(v)
            )
        self.keeper.overlap.drop_step()
        self.keeper.revise()
        self.keeper.held.wake(Topic.LEASES)
        logger().info("learner_began", version=str(version), checkpoint=str(begin.checkpoint or ""))
        return wire.Begun(version=version, branches=self.keeper.ledger.track.lineages.branches)

    async def _reserve(self, reserve: wire.Reserve) -> wire.Batch:
        if groups := await self.keeper.held.wait(Topic.BATCH, lambda: self._batch(reserve)):
            self.keeper.overlap.begin_step(time.time())
            return wire.Batch(version=reserve.version, groups=groups)
        waiting_for = batch_waits_for(self.keeper.config, self.keeper.ledger, self.keeper.fleet)
        return wire.Batch(version=reserve.version, groups=(), waiting_for=waiting_for or "its turn")

    def _batch(self, reserve: wire.Reserve) -> tuple[wire.TrainingGroup, ...]:
        with self.keeper.stored():
            visits = self.keeper.ledger.reserve(reserve.version, reserve.num_groups)
        return tuple(
            wire.TrainingGroup(prompt=self.keeper.store.prompt(v.prompt), scored=self.keeper.store.payload(v.number))
            for v in visits
        )

    async def _commit(self, commit: wire.Commit) -> wire.Committed:
        with self.keeper.stored():
            sequence = self.keeper.ledger.commit(commit.version, commit.visits)
        self.keeper.overlap.end_step(time.time())
        version = str(commit.version.next())
        logger().info("step_committed", version=version, sequence=sequence, num_groups=len(commit.visits))
        return wire.Committed(sequence=sequence)

    async def _publish(self, publish: wire.Publish) -> wire.Done:
        manifest = publish.manifest
        if not self.keeper.ledger.track.includes(manifest.version):
            raise RefusedError(
                f"found {manifest.version} published, expected a version up to {self.keeper.ledger.track.current}"
            )
        if self.keeper.manifest is None or manifest.version >= self.keeper.manifest.version:
            with self.keeper.stored():
                self.keeper.store.save_manifest(manifest)
            self.keeper.manifest = manifest
            self.keeper.revise()
            self.keeper.held.wake(Topic.LEASES)
            logger().info("version_published", version=str(manifest.version), size_bytes=manifest.size_bytes)
        return wire.Done()

    async def _checkpoint(self, checkpoint: wire.Checkpoint) -> wire.Done:
        with self.keeper.stored():
            self.keeper.ledger.checkpoint(checkpoint.version)
        return wire.Done()

    async def _evaluate(self, evaluate: wire.Evaluate) -> wire.Done:
        if not self.keeper.ledger.track.includes(evaluate.version):
            raise RefusedError(
                f"found an evaluation of {evaluate.version}, expected one up to {self.keeper.ledger.track.current}"
            )
        with self.keeper.stored():
            self.keeper.evaluations.ask(evaluate.version, time.time())
        return wire.Done()

    async def _finish(self, finish: wire.Finish) -> wire.Finished:
        if not self.keeper.ledger.closing:
            with self.keeper.stored():
                self.keeper.ledger.finish(finish.reason)
            self.keeper.revise()
            logger().info("run_closing", reason=finish.reason)
        done = await self.keeper.held.wait(Topic.EVALUATIONS, lambda: self.keeper.evaluations.num_pending == 0)
        return wire.Finished(
            done=bool(done),
            accounts=self.keeper.ledger.accounts(),
            waiting_for="" if done else evaluation_waits_for(self.keeper.evaluations, self.keeper.fleet),
        )
