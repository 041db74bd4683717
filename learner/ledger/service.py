"""The ledger's answers: each request becomes one call of the state machine, stored before it is answered."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

from common import wire
from common.config import Config
from common.errors import RefusedError, RunDirectoryError
from common.log import logger
from common.wire import Role
from learner.ledger.held import LONG_HOLD_S, Topic
from learner.ledger.judgement import ALL_RIGHT, ALL_WRONG
from learner.ledger.keeper import Keeper
from learner.ledger.lease_queue import LeaseQueue
from learner.ledger.peers import Peers
from learner.ledger.served import stored_group
from learner.ledger.store import Store
from learner.ledger.waits import PinWait, batch_waits_for, evaluation_waits_for, run_waits_for

Handler: TypeAlias = Callable[[Any], Awaitable[wire.Message]]


class LedgerService:
    """The handler of a `common.transport.Service`.

    Attributes:
        keeper: The state behind it.
        leases: Requests for leases.
    """

    def __init__(
        self,
        store: Store,
        config: Config,
        *,
        run: str,
        incarnation: int,
        refused: Callable[[], dict[str, int]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """State as it was stored.

        Args:
            store: The run's file.
            config: Of the run.
            run: The run's public key.
            incarnation: How often the ledger has started.
            refused: What was turned away so far, by kind.
            clock: Says the seconds since the epoch.
        """
        self.keeper = Keeper(store, config, incarnation=incarnation, clock=clock)
        self.leases = LeaseQueue(self.keeper)
        self._run, self._incarnation, self._refused = run, incarnation, refused
        self._peers, self._pin_wait = Peers(self.keeper.fleet, store), PinWait(config)
        self._handlers: dict[type, Handler] = {
            wire.Beat: self._beat,
            wire.Watch: self._watch,
            wire.LeaseRequest: self._lease,
            wire.GiveBack: self._give_back,
            wire.ScoredGroup: self._score,
            wire.Begin: self._begin,
            wire.Reserve: self._reserve,
            wire.Fetch: self._fetch,
            wire.Commit: self._commit,
            wire.Publish: self._publish,
            wire.Checkpoint: self._checkpoint,
            wire.Evaluate: self._evaluate,
            wire.Finish: self._finish,
            wire.Status: self._status,
        }

    async def handle(self, peer: bytes, request: wire.Request) -> wire.Message:
        """The answer to a request.

        Raises:
            RefusedError: It is no request to a ledger, the peer may not ask it, or the state does not allow it.
        """
        handler = self._handler(peer, request)
        if handler is None:
            raise RefusedError(f"found {type(request).__name__} from {peer.hex()}, expected a request to a ledger")
        if not self.keeper.failed.done():
            try:
                self._peers.admit(peer, request)
                return await handler(request)
            except RunDirectoryError as error:
                self.keeper.fail(error)
        return await asyncio.Future()  # the process ends; whoever starts in its place answers

    def _handler(self, peer: bytes, request: wire.Request) -> Handler | None:
        return partial(self._hello, peer) if isinstance(request, wire.Hello) else self._handlers.get(type(request))

    # Everyone

    async def _hello(self, peer: bytes, hello: wire.Hello) -> wire.Welcome:
        if hello.run != self._run or hello.protocol != wire.PROTOCOL:
            raise RefusedError(
                f"found {hello.name} of run {hello.run[:8]}, protocol {hello.protocol}, "
                f"expected run {self._run[:8]}, protocol {wire.PROTOCOL}"
            )
        if self.keeper.fleet.knows(hello, peer):
            return wire.Welcome(incarnation=self._incarnation)
        self.leases.leave(hello.name)
        with self.keeper.stored():
            num_freed = self.keeper.ledger.free(hello.name) + self.keeper.evaluations.free(hello.name)
            self.keeper.fleet.join(hello, self.keeper.clock(), peer)
            self.keeper.store.save_member(hello.name, hello.role.value, hello.endpoint)
            self._peers.joined(peer, hello)
        logger().info("member_joined", member=hello.name, freed=num_freed)
        self.keeper.held.wake(Topic.LEASES)
        if hello.role is Role.VERIFIER:
            self.keeper.revise()
        return wire.Welcome(incarnation=self._incarnation)

    async def _beat(self, beat: wire.Beat) -> wire.BeatAnswer:
        now = self.keeper.clock()
        with self.keeper.activity.working():
            if not self.keeper.fleet.beat(beat, now):
                return wire.BeatAnswer(cancelled=(), known=False)
            if beat.stats is not None and beat.role is not Role.LEARNER:
                for span in beat.stats.busy:
                    self.keeper.overlap.add(beat.role, span)
            training = tuple(key for key in beat.holds if not key.is_evaluation)
            evaluation = tuple(key for key in beat.holds if key.is_evaluation)
            finished = frozenset(beat.finished)
            cancelled = self.keeper.ledger.beat(beat.name, training, now, finished)
            cancelled += self.keeper.evaluations.beat(beat.name, evaluation, now, finished)
            next_s = self.keeper.fleet.pace_s(self.keeper.config.lease.heartbeat_timeout_s)
            return wire.BeatAnswer(cancelled=cancelled, known=True, next_s=next_s)

    async def _watch(self, watch: wire.Watch) -> wire.Directory:
        keeper = self.keeper
        changed = await keeper.held.wait(
            Topic.DIRECTORY,
            lambda: keeper.directory() if keeper.revision != watch.revision else None,
            hold_s=LONG_HOLD_S,
        )
        return changed or keeper.directory()

    async def _status(self, status: wire.Status) -> wire.StatusReport:
        now = self.keeper.clock()
        overlap_share, busy_shares = self.keeper.overlap.shares(now)
        filtered, num_visits = self.keeper.store.filtered(), self.keeper.ledger.head().num_visits
        return wire.StatusReport(
            version=self.keeper.ledger.track.current,
            members=self.keeper.fleet.members(now),
            accounts=self.keeper.ledger.accounts(),
            epoch=self.keeper.epochs.total(num_visits),
            epochs=self.keeper.epochs.of_files(num_visits),
            filtered_right=filtered.get(ALL_RIGHT, 0),
            filtered_wrong=filtered.get(ALL_WRONG, 0),
            evaluations=tuple(self.keeper.evaluations.finished[max(0, status.num_evaluations) :]),
            overlap_share=overlap_share,
            busy_shares=busy_shares,
            waiting_for=run_waits_for(
                self.keeper.config, self.keeper.ledger, self.keeper.evaluations, self.keeper.fleet, self.keeper.manifest
            ),
            pin_wait_s=self._pin_wait.seconds,
            refused=self._refused(),
        )

    # Generators and verifiers

    async def _lease(self, request: wire.LeaseRequest) -> wire.Leases:
        return await self.leases.ask(request)

    async def _give_back(self, give_back: wire.GiveBack) -> wire.Done:
        name = give_back.name
        if give_back.leaves and self.keeper.fleet.leave(name):
            self.keeper.store.drop_member(name)
            self.leases.leave(name)
            logger().info("member_left", member=name)
        with self.keeper.stored():
            for lease in give_back.leases:
                accounts = self.keeper.evaluations if lease.key.is_evaluation else self.keeper.ledger
                if accounts.give_back(name, lease):
                    logger().info("lease_given_back", member=name, visit=lease.key.visit, reason=lease.reason)
        return wire.Done()

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
            version = self.keeper.ledger.begin(begin.checkpoint, begin.sequence, begin.num_visits)
            self.keeper.evaluations.abandon(
                v for v in self.keeper.evaluations.versions() if self.keeper.ledger.track.includes(v)
            )
        self.keeper.overlap.drop_step()
        self.keeper.revise()
        self.keeper.held.wake(Topic.LEASES)
        logger().info("learner_began", version=str(version), checkpoint=str(begin.checkpoint or ""))
        return wire.Begun(version=version, branches=self.keeper.ledger.track.lineages.branches)

    async def _reserve(self, reserve: wire.Reserve) -> wire.Batch:
        if visits := await self.keeper.held.wait(Topic.BATCH, lambda: self._batch(reserve)):
            self.keeper.overlap.begin_step(self.keeper.clock())
            return wire.Batch(version=reserve.version, visits=visits)
        waiting_for = batch_waits_for(self.keeper.config, self.keeper.ledger, self.keeper.fleet)
        return wire.Batch(version=reserve.version, visits=(), waiting_for=waiting_for or "its turn")

    def _batch(self, reserve: wire.Reserve) -> tuple[int, ...]:
        with self.keeper.stored():
            visits = self.keeper.ledger.reserve(reserve.version, reserve.num_groups)
        self._pin_wait.look(self.keeper.ledger, reserve.version if visits else None, self.keeper.clock())
        return tuple(visit.number for visit in visits)

    async def _fetch(self, fetch: wire.Fetch) -> wire.Message:
        visit = self.keeper.ledger.reserved(fetch.version, fetch.visit)
        if visit is None:
            return wire.Fetched(group=None)
        store = self.keeper.store
        with self.keeper.activity.working():
            if (scored := store.payload_bytes(visit.number)) is not None:
                return stored_group(store.prompt_bytes(visit.prompt), scored, has_expired=visit.pinned)
        reason = "the stored group is not there as it was stored"
        logger().error("group_lost", visit=visit.number, where=str(store.where(visit.number)))
        with self.keeper.stored():
            self.keeper.ledger.lose(visit, reason)
        return wire.Fetched(group=None)

    async def _commit(self, commit: wire.Commit) -> wire.Committed:
        with self.keeper.stored():
            sequence = self.keeper.ledger.commit(commit.version, commit.visits)
        await self.keeper.sync()
        self.keeper.overlap.end_step(self.keeper.clock())
        version = str(commit.version.next())
        logger().info("step_committed", version=version, sequence=sequence, num_groups=len(commit.visits))
        return wire.Committed(sequence=sequence, num_visits=self.keeper.ledger.head().num_visits)

    async def _publish(self, publish: wire.Publish) -> wire.Done:
        manifest = publish.manifest
        if not self.keeper.ledger.track.includes(manifest.version):
            raise RefusedError(
                f"found {manifest.version} published, expected a version up to {self.keeper.ledger.track.current}"
            )
        if self.keeper.manifest is None or manifest.version >= self.keeper.manifest.version:
            with self.keeper.stored():
                self.keeper.store.save_manifest(manifest)
                self.keeper.evaluations.published(manifest.version, self.keeper.clock())
            self.keeper.manifest = manifest
            self.keeper.revise()
            self.leases.send_off()
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
        manifest = self.keeper.manifest
        is_published = manifest is not None and manifest.version >= evaluate.version
        with self.keeper.stored():
            self.keeper.evaluations.ask(evaluate.version, self.keeper.clock() if is_published else math.inf)
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
