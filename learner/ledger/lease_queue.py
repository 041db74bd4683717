"""Leases for generators, and the requests that wait for one."""

import asyncio
from typing import NamedTuple

from common import wire
from common.errors import RefusedError, RunDirectoryError
from common.versions import Version
from learner.ledger.held import LONG_HOLD_S, Topic
from learner.ledger.keeper import Keeper
from learner.ledger.leases import evaluation_lease, training_lease
from learner.ledger.waits import lease_waits_for

_LOOK_S = 1.0

_Leases = tuple[wire.Lease, ...]


class _Waiter(NamedTuple):
    request: wire.LeaseRequest
    answer: asyncio.Future[_Leases]


class LeaseQueue:
    """Those who wait, by the version that their engine holds, each version's in the order in which they came.

    Whether there is a place depends on the version alone: where the first of a version gets none, the others of that
    version are not asked. So what one change costs does not grow with the fleet.
    """

    def __init__(self, keeper: Keeper) -> None:
        """Grants what `keeper` keeps."""
        self._keeper = keeper
        self._waiting: dict[Version, dict[str, _Waiter]] = {}

    async def ask(self, request: wire.LeaseRequest) -> wire.Leases:
        """The answer to a request: leases, or after a while what the ledger waits for.

        Raises:
            RefusedError: The engine's lineage has not begun.
        """
        if not self._keeper.ledger.track.knows(request.version):
            raise RefusedError(f"found an engine at {request.version}, expected a lineage that has begun")
        self.leave(request.name)
        leases = await self._wait(request) if request.room > 0 else ()  # others wait behind who waits
        return wire.Leases(leases=leases, waiting_for="" if leases else self._why_none(request))

    def leave(self, name: str) -> None:
        """The generator's request that waits is answered with nothing: it has asked anew, or was replaced."""
        for waiters in self._waiting.values():
            if name in waiters:
                _answer(waiters[name], ())

    def send_off(self) -> None:
        """Everyone is answered with nothing: at an old version they would miss their places in the new one's budget."""
        for waiters in self._waiting.values():
            for waiter in waiters.values():
                _answer(waiter, ())

    async def work(self) -> None:
        """Gives free places to those who came first, newer engines before older ones, until cancelled."""
        while True:
            await self._keeper.held.change(Topic.LEASES, _LOOK_S)  # an evaluation goes to older engines after a while
            try:
                for version in sorted(self._waiting, reverse=True):
                    self._serve(version)
            except RunDirectoryError as error:
                self._keeper.fail(error)
                return

    def _serve(self, version: Version) -> None:
        for waiter in self._waiting[version].values():
            if waiter.answer.done():
                continue
            if waiter.request.name not in self._keeper.fleet:
                _answer(waiter, ())
            elif leases := self._grant(waiter.request):
                _answer(waiter, leases)
            else:
                break

    async def _wait(self, request: wire.LeaseRequest) -> _Leases:
        waiter = _Waiter(request, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(request.version, {})[request.name] = waiter
        try:
            self._serve(request.version)
            await asyncio.wait([waiter.answer], timeout=LONG_HOLD_S)  # it loses no answer that was given
        finally:
            self._forget(waiter)
        return waiter.answer.result() if waiter.answer.done() else ()

    def _forget(self, waiter: _Waiter) -> None:
        waiters = self._waiting.get(waiter.request.version, {})
        if waiters.get(waiter.request.name) is waiter:
            del waiters[waiter.request.name]
            if not waiters:
                del self._waiting[waiter.request.version]

    def _grant(self, request: wire.LeaseRequest) -> _Leases:
        """Evaluations first, then training."""
        now, room = self._keeper.clock(), request.room
        with self._keeper.stored():
            evaluations = self._keeper.evaluations.grant(request.name, request.version, room, now)
            visits = self._keeper.ledger.grant(request.name, request.version, room - len(evaluations), now)
        return (
            *(evaluation_lease(self._keeper.store, self._keeper.config, visit) for visit in evaluations),
            *(training_lease(self._keeper.store, self._keeper.config, visit) for visit in visits),
        )

    def _why_none(self, request: wire.LeaseRequest) -> str:
        if request.name not in self._keeper.fleet:
            return f"a hello from {request.name}"
        track = self._keeper.ledger.track
        behind = 0 if track.current is None else track.staleness(request.version)
        return lease_waits_for(self._keeper.config, self._keeper.ledger, behind)


def _answer(waiter: _Waiter, leases: _Leases) -> None:
    if not waiter.answer.done():
        waiter.answer.set_result(leases)
