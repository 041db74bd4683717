"""Finished groups on their way to the verifiers: kept until the ledger's verdict is heard."""

import asyncio
from collections.abc import Callable, Iterable

from common import wire
from common.errors import RefusedError, SilenceError
from common.log import logger
from common.membership import Activity
from common.transport import Client, RunKeys

BACK_OFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_REFUSED_PAUSE_S = 0.5


class Handover:
    """Offers each group to the verifiers; the one with room takes it, and one that falls silent is passed over.

    What this does not do: it never drops a group by itself. Only a verdict, or a lease that is no longer wanted, ends
    its keeping.
    """

    def __init__(self, keys: RunKeys, activity: Activity) -> None:
        self._keys = keys
        self._activity = activity
        self._held: dict[wire.LeaseKey, tuple[wire.Group, Callable[[], None]]] = {}
        self._waiting: asyncio.Queue[wire.LeaseKey] = asyncio.Queue()
        self._peers: dict[str, asyncio.Task[None]] = {}

    def holds(self) -> Iterable[wire.LeaseKey]:
        """The leases whose groups are kept."""
        return self._held.keys()

    def offer(self, group: wire.Group, when_done: Callable[[], None]) -> None:
        """Keeps a group until its verdict, then calls `when_done`."""
        self._held[group.key] = (group, when_done)
        self._waiting.put_nowait(group.key)
        self._activity.gauges["groups_waiting"] = self._waiting.qsize()

    def drop(self, key: wire.LeaseKey) -> None:
        """Ends the keeping of a group that is no longer wanted."""
        if (held := self._held.pop(key, None)) is not None:
            held[1]()

    def meet(self, endpoints: tuple[str, ...], tasks: asyncio.TaskGroup) -> None:
        """Deals with exactly these verifiers from now on."""
        for endpoint in self._peers.keys() - set(endpoints):
            self._peers.pop(endpoint).cancel()
        for endpoint in endpoints:
            if endpoint not in self._peers:
                self._peers[endpoint] = tasks.create_task(self._serve(endpoint))

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """What deals with the verifiers, to be cancelled at the end."""
        return self._peers.values()

    async def _serve(self, endpoint: str) -> None:
        """Sends groups to one verifier, as many at once as it has room for."""
        verifier = Client(lambda: endpoint, keys=self._keys, name=f"verifier at {endpoint}")
        async with verifier, asyncio.TaskGroup() as sending:
            num_silences = 0
            while True:
                key = await self._waiting.get()
                try:
                    room = await self._ask_for_room(verifier)
                except (SilenceError, RefusedError) as error:
                    self._waiting.put_nowait(key)
                    logger().warning("verifier_silent", endpoint=endpoint, reason=str(error))
                    await asyncio.sleep(BACK_OFF_S[min(num_silences, len(BACK_OFF_S) - 1)])
                    num_silences += 1
                    continue
                except asyncio.CancelledError:
                    self._waiting.put_nowait(key)
                    raise
                num_silences = 0
                self._send(verifier, [key, *self._next(room - 1)], room, sending)

    async def _ask_for_room(self, verifier: Client) -> int:
        request = wire.RoomRequest(num_groups=1 + self._waiting.qsize())
        return (await verifier.ask_once(request, wire.Room)).num_groups

    def _next(self, num: int) -> list[wire.LeaseKey]:
        return [self._waiting.get_nowait() for _ in range(min(num, self._waiting.qsize()))]

    def _send(self, verifier: Client, keys: list[wire.LeaseKey], room: int, sending: asyncio.TaskGroup) -> None:
        if room <= 0:
            for key in keys:
                self._waiting.put_nowait(key)
            return
        for key in keys:
            sending.create_task(self._deliver(verifier, key))

    async def _deliver(self, verifier: Client, key: wire.LeaseKey) -> None:
        """Sends one group and hears its verdict; offers it again where the verifier falls silent."""
        if key not in self._held:
            return
        group, _ = self._held[key]
        try:
            verdict = await verifier.ask_once(group, wire.Verdict)
        except (SilenceError, RefusedError) as error:
            logger().warning("group_sent_again", visit=key.visit, reason=str(error))
            try:
                await asyncio.sleep(_REFUSED_PAUSE_S)  # a verifier that the ledger has lost says hello within a beat
            finally:
                self._waiting.put_nowait(key)
            return
        except asyncio.CancelledError:
            self._waiting.put_nowait(key)
            raise
        if verdict.status == "refused":
            logger().info("group_refused", visit=key.visit, reason=verdict.reason)
        self.drop(key)
