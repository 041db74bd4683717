"""From leases to finished groups, or back."""

import asyncio
import time

from common import wire
from common.config import Config
from common.errors import DeadlineError
from common.log import logger
from common.membership import Activity
from common.transport import Client
from generator.engine import Engine
from generator.handover import Handover
from generator.weights import Weights

MAX_PIN_S = 30.0
REPORT_S = 0.5
LEAVE_S, LEAVE_SHARE = 5.0, 1 / 10  # the latter of run.stop_timeout_s
_MIN_PAUSE_S = 0.05


class Rollouts:
    """Asks for leases while there is room, samples their groups, and hands them over.

    A lease of which no group comes is given back at once: too few completions in time, or the engine gave one up.

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
        self._finished: set[wire.LeaseKey] = set()
        self._pinned: set[asyncio.Task[None]] = set()
        self._trusted = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def holds(self) -> tuple[wire.LeaseKey, ...]:
        """The leases that this generator works on or waits to hand over."""
        return (*self._sampling, *self._handover.holds())

    def finished(self) -> tuple[wire.LeaseKey, ...]:
        """Those of them whose completions are all there."""
        return (*self._finished, *self._handover.holds())

    async def report(self) -> None:
        """Counts tokens as they are sampled, until cancelled, so that one long answer is not taken for a standstill."""
        num_reported = 0
        while True:
            await asyncio.sleep(REPORT_S)
            load = self._engine.load_now()
            self._activity.gauges |= {"engine_requests": load.num_running, "engine_tokens": load.num_cached_tokens}
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
                if not weights.ready.is_set():  # another version is being loaded since
                    continue
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
        self._finished.discard(key)
        self._room.set()

    async def leave(self, keys: tuple[wire.LeaseKey, ...]) -> None:
        """Gives leases back before the process ends, so that nobody waits for its silence; gets no others after it."""
        try:
            deadline_s = min(LEAVE_S, LEAVE_SHARE * self._config.run.stop_timeout_s)
            await self._give_back(keys, "it stops", leaves=True, deadline_s=deadline_s)
        except DeadlineError as error:
            logger().warning("leases_not_given_back", num_leases=len(keys), reason=str(error))

    async def _give_back(
        self, keys: tuple[wire.LeaseKey, ...], reason: str, *, leaves: bool = False, deadline_s: float
    ) -> None:
        leases = tuple(wire.Returned(key, reason) for key in keys)
        request = wire.GiveBack(name=self._name, leases=leases, leaves=leaves)
        await self._ledger.ask(request, wire.Done, deadline_s=deadline_s)

    async def _sample(self, lease: wire.Lease) -> None:
        began = time.monotonic()
        with self._activity.working():
            completions = await self._complete(lease)
        if reason := _why_no_group(lease, completions):
            logger().warning("group_given_up", visit=lease.key.visit, attempt=lease.key.attempt, reason=reason)
            await self._give_back((lease.key,), reason, deadline_s=self._config.run.stall_timeout_s)
            return
        self._finished.add(lease.key)
        await self._trusted.wait()  # what an engine sampled that fails the gate goes nowhere
        self._activity.count(num_tokens=0, num_items=len(completions))
        group = wire.Group(
            key=lease.key,
            generator=self._name,
            prompt_id=lease.prompt.id,
            answer=lease.prompt.answer,
            reward=lease.prompt.reward,
            completions=tuple(completions),
            seconds=time.monotonic() - began,
        )
        self._handover.offer(group, self._room.set)

    async def _complete(self, lease: wire.Lease) -> list[wire.Completion]:
        """The completions that ended within the lease's deadline, in order; what is late is stopped in the engine."""
        token_ids = wire.ints(lease.prompt.token_ids)
        requests: dict[str, asyncio.Task[wire.Completion]] = {}
        for i in range(lease.num_completions):
            request_id = f"{lease.key.visit}.{lease.key.attempt}.{i}."  # the last dot: 1 is not the beginning of 10
            completion = self._engine.generate(
                token_ids,
                lease.sampling,
                seed=lease.seed + i,
                request_id=request_id,
                routed_experts=lease.routed_experts,
            )
            requests[request_id] = asyncio.create_task(completion)
        try:
            await asyncio.wait(requests.values(), timeout=lease.deadline_s, return_when=asyncio.FIRST_EXCEPTION)
            return [task.result() for task in requests.values() if task.done()]
        finally:
            for request_id, task in requests.items():
                if not task.done():
                    self._engine.abort(request_id)
                    task.cancel()


def _why_no_group(lease: wire.Lease, completions: list[wire.Completion]) -> str:
    """Why the completions that are there make no group; empty where they do."""
    num, num_there = lease.num_completions, len(completions)
    if num_aborted := sum(c.finish_reason is wire.FinishReason.ABORT or not c.num_tokens for c in completions):
        return f"the engine gave up {num_aborted} of {num} completions"
    if num_there < lease.min_completions:
        return f"{num_there} of {num} completions after {lease.deadline_s:g} s, expected {lease.min_completions}"
    return ""
