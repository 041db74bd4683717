"""Pulling: a file of weights from its publisher, by chunks over several connections, checked, and taken up again."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from common import wire
from common.errors import DeadlineError, RefusedError, WeightsError, WireError
from common.log import logger
from common.process import first_error
from common.rendezvous import RunKeys
from common.transport import Client
from common.versions import Version
from common.weights.partial import Partial
from common.weights.shelf import NUM_CONNECTIONS
from common.weights.work import to_its_end

CREDITS = 4  # requests under way on each
NUM_TRIES = 3  # of a chunk that comes damaged

A = TypeVar("A", bound=wire.Message)


class Puller:
    """Pulls files. Chunks are asked for, never pushed: who pulls bounds what is under way.

    Beside the file it holds `NUM_CONNECTIONS` times `CREDITS` chunks or so.

    Attributes:
        bytes_in: Bytes of chunks that came.
        num_damaged: Chunks that were not what they should be.
    """

    def __init__(self, keys: RunKeys | None, *, deadline_s: float) -> None:
        """`deadline_s` is how long a publisher may be silent, or bring no chunk."""
        self._keys, self._deadline_s = keys, deadline_s
        self.bytes_in = 0
        self.num_damaged = 0

    async def files(self, publisher: str, version: Version, have: Version | None) -> wire.PartFiles:
        """What makes a publisher's part of a version of what is there already.

        Raises:
            RefusedError: The publisher no longer has the version.
            DeadlineError: It is silent, or does not get the version encoded.
            WeightsError: What it says is malformed, or does not make that version.
        """
        request, what = wire.PartRequest(version=version, have=have), f"the part of {version} from {publisher}"
        try:
            async with asyncio.timeout(self._deadline_s), self._client(publisher) as client:
                answer = await self._ask(client, request, wire.PartFiles, what)
        except TimeoutError as error:
            raise DeadlineError(f"{what}: waited {self._deadline_s:g} s for it to be encoded") from error
        start, end = have, have
        if answer.files:
            start, end = answer.files[0].key.base, answer.files[-1].key.version
        if end != version or start not in (None, have):
            raise WeightsError(
                f"part {answer.part} from {publisher}: found files from {start} to {end}, expected such as make "
                f"{version} of {have}"
            )
        return answer

    async def pull(self, content: wire.Content, path: Path, publisher: str) -> None:
        """Makes the file at `path`, whole or not at all; what is there of it after an error is taken up next time.

        Raises:
            RunDirectoryError: There is no room.
            RefusedError: The publisher no longer has the file.
            DeadlineError: It is silent, or gets nowhere.
            WeightsError: What it hands out is damaged.
        """
        partial = await to_its_end(Partial.open, content, path)
        try:
            if partial.missing:
                await self._pull(publisher, partial)
            partial.finish()
        finally:
            partial.close()

    async def _pull(self, publisher: str, partial: Partial) -> None:
        rest = iter(sorted(partial.missing))
        try:
            async with asyncio.timeout(self._deadline_s) as patience, asyncio.TaskGroup() as tasks:
                for _ in range(min(NUM_CONNECTIONS, len(partial.missing))):
                    tasks.create_task(self._connection(publisher, partial, rest, patience))
        except TimeoutError as error:
            raise DeadlineError(
                f"{partial.content.key}: waited {self._deadline_s:g} s for the next of {len(partial.missing)} chunks "
                f"from {publisher}"
            ) from error
        except BaseExceptionGroup as group:
            raise first_error(group) from group

    async def _connection(
        self, publisher: str, partial: Partial, rest: Iterator[int], patience: asyncio.Timeout
    ) -> None:
        loop = asyncio.get_running_loop()

        async def pull_some(client: Client) -> None:
            for index in rest:
                await self._chunk(client, publisher, partial, index)
                if not patience.expired():
                    patience.reschedule(loop.time() + self._deadline_s)

        async with self._client(publisher) as client, asyncio.TaskGroup() as tasks:
            for _ in range(CREDITS):
                tasks.create_task(pull_some(client))

    async def _chunk(self, client: Client, publisher: str, partial: Partial, index: int) -> None:
        """Pulls a chunk until it is what it should be.

        Raises:
            WeightsError: It never is.
        """
        key = partial.content.key
        request = wire.ChunkRequest(key=key, index=index)
        for _ in range(NUM_TRIES):
            chunk = await self._ask(client, request, wire.Chunk, f"{key}: chunk {index} from {publisher}")
            self.bytes_in += len(chunk.data)
            if partial.put(index, chunk.data):
                return
            self.num_damaged += 1
            logger().warning("chunk_damaged", file=str(key), chunk=index, publisher=publisher)
        raise WeightsError(
            f"{key}: chunk {index} from {publisher}: found other bytes than were published in {NUM_TRIES} tries, "
            f"expected {partial.content.chunk_bytes(index)} of checksum {partial.content.chunk_sums()[index]:016x}"
        )

    async def _ask(self, client: Client, request: wire.Request, expect: type[A], what: str) -> A:
        """The publisher's answer; its errors say what was asked for."""
        try:
            return await client.ask(request, expect, deadline_s=self._deadline_s)
        except (RefusedError, DeadlineError) as error:
            raise type(error)(f"{what}: {error}") from error
        except WireError as error:
            raise WeightsError(f"{what}: {error}") from error

    def _client(self, publisher: str) -> Client:
        return Client(lambda: publisher, keys=self._keys, name="publisher")
