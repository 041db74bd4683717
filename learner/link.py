"""The learner's link to the ledger: blocking calls for the loop, over a socket that a thread of its own keeps alive."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

from common import wire
from common.errors import RefusedError, RunDirectoryError, StallError
from common.membership import Activity, Membership
from common.rendezvous import RunKeys
from common.transport import Client, ledger_client
from common.versions import Lineages, Version

_NUM_FETCHES = 4

T = TypeVar("T")
A = TypeVar("A", bound=wire.Message)


class LedgerLink:
    """What the training loop says to the ledger. Use as a context manager.

    Attributes:
        activity: What the learner's beats report.
    """

    def __init__(self, run_dir: Path, *, stall_timeout_s: float, should_stop: Callable[[], bool]) -> None:
        self._run_dir = run_dir
        self._stall_timeout_s = stall_timeout_s
        self._should_stop = should_stop
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="ledger-link", daemon=True)
        self._client: Client | None = None
        self._beats: Future[None] | None = None
        self.activity = Activity()

    def __enter__(self) -> Self:
        self._thread.start()
        self._client = ledger_client(self._run_dir)
        hello = wire.Hello(role=wire.Role.LEARNER, name="learner-0", run=RunKeys.load(self._run_dir).public)
        membership = Membership(self._client, hello, self.activity, deadline_s=self._stall_timeout_s)
        self._run(membership.join())
        self._beats = asyncio.run_coroutine_threadsafe(membership.keep(), self._loop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._client is not None
        if self._beats is not None:
            self._beats.cancel()
        self._run(self._client.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    def begin(self, checkpoint: Version | None, commit: wire.Committed) -> tuple[Version, Lineages]:
        """The version under which training goes on from a checkpoint, and all lineages.

        Args:
            checkpoint: What the policy holds; None for the starting weights.
            commit: What the ledger said when they were made; zeros for the starting weights.

        Raises:
            RunDirectoryError: The ledger and the checkpoint do not belong together; a restart would find the same.
        """
        try:
            begun = self._ask(
                wire.Begin(checkpoint=checkpoint, sequence=commit.sequence, num_visits=commit.num_visits), wire.Begun
            )
        except RefusedError as error:
            raise RunDirectoryError(f"{self._run_dir}: {error}") from error
        if checkpoint is not None:
            self.checkpointed(checkpoint)  # the learner may have been killed before it could say so
        return begun.version, Lineages(begun.branches)

    def reserve(
        self, version: Version, num_groups: int, check: Callable[[], None]
    ) -> tuple[wire.TrainingGroup, ...] | None:
        """The groups of the step that starts at `version`, oldest first; None where the run is asked to stop.

        `check` is called every so often: it may raise.

        Raises:
            StallError: Nothing the ledger waits for changed within `stall_timeout_s`.
        """
        waiting_for, since = "", time.monotonic()
        while not self._should_stop():
            check()
            batch = self._ask(wire.Reserve(version=version, num_groups=num_groups), wire.Batch)
            if batch.visits and (groups := self._run(self._fetch_all(version, batch.visits))):
                return groups
            if batch.waiting_for != waiting_for:
                waiting_for, since = batch.waiting_for, time.monotonic()
            elif time.monotonic() - since > self._stall_timeout_s:
                raise StallError(f"the learner waited {self._stall_timeout_s:g} s for {waiting_for}")
        return None

    async def _fetch_all(self, version: Version, visits: tuple[int, ...]) -> tuple[wire.TrainingGroup, ...]:
        """The groups of a batch, a few at a time: one may have tens of megabytes. Empty where the ledger lost one."""
        assert self._client is not None
        client, room = self._client, asyncio.Semaphore(_NUM_FETCHES)

        async def fetch(visit: int) -> wire.TrainingGroup | None:
            async with room:
                request = wire.Fetch(version=version, visit=visit)
                return (await client.ask(request, wire.Fetched, deadline_s=self._stall_timeout_s)).group

        groups = await asyncio.gather(*map(fetch, visits))
        return tuple(group for group in groups if group is not None) if None not in groups else ()

    def commit(self, version: Version, groups: tuple[wire.TrainingGroup, ...]) -> wire.Committed:
        """Tells the ledger that the step from `version` trained `groups`; returns what a checkpoint says of it."""
        visits = tuple(training.scored.group.key.visit for training in groups)
        return self._ask(wire.Commit(version=version, visits=visits), wire.Committed)

    def publish(self, manifest: wire.Manifest) -> None:
        """Announces a version."""
        self._ask(wire.Publish(manifest=manifest), wire.Done)

    def checkpointed(self, version: Version) -> None:
        """Tells the ledger that the checkpoint of `version` is durable."""
        self._ask(wire.Checkpoint(version=version), wire.Done)

    def evaluate(self, version: Version) -> None:
        """Asks for an evaluation of a published version."""
        self._ask(wire.Evaluate(version=version), wire.Done)

    def status(self, num_evaluations: int) -> wire.StatusReport:
        """How the run stands."""
        return self._ask(wire.Status(num_evaluations=num_evaluations), wire.StatusReport)

    def finish(self, reason: str, check: Callable[[], None]) -> dict[str, int]:
        """Ends the run in the ledger, waits for the last evaluations, and returns the accounts; `check` may raise.

        Raises:
            StallError: The evaluations did not get on within `stall_timeout_s`.
        """
        waiting_for, since = "", time.monotonic()
        while True:
            check()
            finished = self._ask(wire.Finish(reason=reason), wire.Finished)
            if finished.done or self._should_stop():
                return finished.accounts
            if finished.waiting_for != waiting_for:
                waiting_for, since = finished.waiting_for, time.monotonic()
            elif time.monotonic() - since > self._stall_timeout_s:
                raise StallError(f"the learner waited {self._stall_timeout_s:g} s for {waiting_for}")

    def _ask(self, message: wire.Request, expect: type[A]) -> A:
        assert self._client is not None
        if self._beats is not None and self._beats.done():
            self._beats.result()
        return self._run(self._client.ask(message, expect, deadline_s=self._stall_timeout_s))

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
