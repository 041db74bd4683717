"""From leases to finished groups."""

import asyncio
import time

from common import wire
from common.config import Config
from common.log import logger
from common.membership import Activity
from common.transport import Client
from generator.engine import Engine
from generator.handover import Handover
from generator.weights import Weights

MAX_PIN_S = 30.0
REPORT_S = 0.5
_MIN_PAUSE_S = 0.05


class Rollouts:
    """Asks for leases while there is room, samples their groups, and hands them over.

    What this does not do: it keeps nothing on disk. A generator that dies loses its groups, and their leases expire.
    """

    def __init__(
        self, name: str, engine: Engine, ledger: Client, handover: Handover, config: Config, activity: Activity
    ) -> None:
        """`name` is the process's; `activity` hears when the engine has work."""
        self._name = name
        self._engine = engine
        self._ledger = ledger
        self._handover = handover
        self._config = config
        self._activity = activity
        self._sampling: dict[wire.LeaseKey, asyncio.Task[None]] = {}
        self._pinned: set[asyncio.Task[None]] = set()
        self._trusted = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def holds(self) -> tuple[wire.LeaseKey, ...]:
        """The leases that this generator works on or waits to hand over."""
        return (*self._sampling, *self._handover.holds())

    async def report(self) -> None:
        """Counts tokens as they are sampled, until cancelled, so that one long answer is not taken for a standstill."""
        num_reported = 0
        while True:
            await asyncio.sleep(REPORT_S)
            num_so_far = self._engine.num_tokens()  # fewer than before where requests were aborted
            self._activity.count(num_tokens=max(0, num_so_far - num_reported), num_items=0)
            num_reported = num_so_far

    def cancel(self, keys: tuple[wire.LeaseKey, ...]) -> None:
        """Stops work on leases that are no longer wanted, in the engine too."""
        for key in keys:
            if (task := self._sampling.get(key)) is not None:
                task.cancel()
            self._handover.drop(key)

    async def finish_pinned(self) -> None:
        """Waits for evaluations that are pinned to the engine's version, though not for ever."""
        if self._pinned:
            await asyncio.wait(self._pinned, timeout=MAX_PIN_S)

    async def work(self, weights: Weights) -> None:
        """Turns leases into groups, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._trusted = weights.ready
            while True:
                await weights.ready.wait()
                await self._room.wait()
                room = self._config.generator.max_groups - len(self.holds())
                if room <= 0:
                    self._room.clear()
                    continue
                for lease in await self._ask_for_leases(room):
                    self._start(lease, tasks)

    async def _ask_for_leases(self, room: int) -> tuple[wire.Lease, ...]:
        assert self._engine.version is not None
        request = wire.LeaseRequest(name=self._name, version=self._engine.version, room=room)
        leases = await self._ledger.ask(request, wire.Leases, deadline_s=self._config.run.stall_timeout_s)
        if not leases.leases:
            await asyncio.sleep(_MIN_PAUSE_S)
        return leases.leases

    def _start(self, lease: wire.Lease, tasks: asyncio.TaskGroup) -> None:
        if lease.key in self._sampling:
            return
        task = tasks.create_task(self._sample(lease))
        self._sampling[lease.key] = task
        task.add_done_callback(lambda _: self._ended(lease.key))
        if lease.pinned_version is not None and lease.pinned_version == self._engine.version:
            self._pinned.add(task)
            task.add_done_callback(self._pinned.discard)

    def _ended(self, key: wire.LeaseKey) -> None:
        self._sampling.pop(key, None)
        self._room.set()

    async def _sample(self, lease: wire.Lease) -> None:
        began = time.monotonic()
        with self._activity.working():
            completions = await self._complete(lease)
        if completions is None:
            return
        await self._trusted.wait()  # what an engine sampled that fails the gate goes nowhere
        self._activity.count(num_tokens=0, num_items=len(completions))
        group = wire.Group(
            key=lease.key,
            generator=self._name,
            prompt_id=lease.prompt.id,
            answer=lease.prompt.answer,
            reward=lease.prompt.reward,
            completions=completions,
            seconds=time.monotonic() - began,
        )
        self._handover.offer(group, self._room.set)

    async def _complete(self, lease: wire.Lease) -> tuple[wire.Completion, ...] | None:
        """All completions of a lease; None where it was cancelled or the engine gave one up: then the lease lapses."""
        ids = [f"{lease.key.visit}.{lease.key.attempt}.{i}" for i in range(lease.num_completions)]
        token_ids = wire.ints(lease.prompt.token_ids)
        try:
            completions = await asyncio.gather(
                *(
                    self._engine.generate(
                        token_ids,
                        lease.sampling,
                        seed=lease.seed + i,
                        request_id=request_id,
                        routed_experts=lease.routed_experts,
                    )
                    for i, request_id in enumerate(ids)
                )
            )
        except asyncio.CancelledError:
            for request_id in ids:
                self._engine.abort(request_id)
            raise
        if any(c.finish_reason is wire.FinishReason.ABORT or not c.num_tokens for c in completions):
            logger().warning("group_given_up", visit=lease.key.visit, attempt=lease.key.attempt)
            return None
        return tuple(completions)
