"""Pulling: a file of weights from its publisher, by chunks over several connections, checked, and taken up again."""

import asyncio
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from common import wire
from common.errors import DeadlineError, RefusedError, SilenceError, WeightsError, WireError
from common.log import logger
from common.process import first_error
from common.rendezvous import RunKeys
from common.transport import SILENCE_S, Client
from common.versions import Version
from common.weights.partial import Partial
from common.weights.shelf import NUM_CONNECTIONS
from common.weights.work import to_its_end

CREDITS = 4  # requests under way on each connection
MAX_UNDER_WAY = 32  # requests under way in all
NUM_TRIES = 3  # of a chunk that comes damaged
AHEAD_SHARE = 1 / 5  # of a whole part: deltas after it are pulled before it, which takes long and they may be gone then


class Puller:
    """Pulls files. Chunks are asked for, never pushed: who pulls bounds what is under way.

    Beside the files it holds `MAX_UNDER_WAY` chunks or so.

    Attributes:
        bytes_in: Bytes of chunks that came.
        num_damaged: Chunks that were not what they should be.
    """

    def __init__(self, keys: RunKeys | None, *, deadline_s: float) -> None:
        """`deadline_s` is how long a publisher may be silent, or bring no chunk."""
        self._keys, self._deadline_s = keys, deadline_s
        self._room = asyncio.Semaphore(MAX_UNDER_WAY)
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
                with _mentioned(what):
                    answer = await client.ask(request, wire.PartFiles, deadline_s=self._deadline_s)
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

    async def pull(
        self, content: wire.Content, path: Path, publisher: str, *, num_connections: int = NUM_CONNECTIONS
    ) -> None:
        """Makes the file at `path`, whole or not at all; what is there of it after an error is taken up next time.

        Args:
            content: What the file will be.
            path: Where it will stand.
            publisher: Who hands it out.
            num_connections: How many to open.

        Raises:
            RunDirectoryError: There is no room.
            RefusedError: The publisher no longer has the file.
            DeadlineError: It is silent, or gets nowhere.
            WeightsError: What it hands out is damaged.
        """
        partial = await to_its_end(Partial.open, content, path)
        try:
            if partial.missing:
                await self._pull(_Transfer(publisher, partial, self._deadline_s), num_connections)
            partial.finish()
        finally:
            partial.close()

    async def _pull(self, transfer: "_Transfer", num_connections: int) -> None:
        try:
            async with asyncio.timeout(self._deadline_s) as patience, asyncio.TaskGroup() as tasks:
                for _ in range(min(num_connections, len(transfer.rest))):
                    tasks.create_task(self._connection(transfer, patience))
        except TimeoutError as error:
            raise DeadlineError(
                f"{transfer.key}: waited {self._deadline_s:g} s for the next of {len(transfer.partial.missing)} chunks "
                f"from {transfer.publisher}"
            ) from error
        except BaseExceptionGroup as group:
            raise first_error(group) from group

    async def _connection(self, transfer: "_Transfer", patience: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()

        async def pull_some(client: Client) -> None:
            while transfer.rest:
                await self._chunk(client, transfer, transfer.rest.popleft())
                if not patience.expired():
                    patience.reschedule(loop.time() + self._deadline_s)

        async with self._client(transfer.publisher) as client, asyncio.TaskGroup() as tasks:
            for _ in range(CREDITS):
                tasks.create_task(pull_some(client))

    async def _chunk(self, client: Client, transfer: "_Transfer", index: int) -> None:
        """Pulls a chunk until it is what it should be.

        Raises:
            WeightsError: It never is.
        """
        key, content = transfer.key, transfer.partial.content
        for _ in range(NUM_TRIES):
            chunk = await transfer.ask(client, index, self._room)
            self.bytes_in += len(chunk.data)
            if transfer.partial.put(index, chunk.data):
                return
            self.num_damaged += 1
            logger().warning("chunk_damaged", file=str(key), chunk=index, publisher=transfer.publisher)
        raise WeightsError(
            f"{key}: chunk {index} from {transfer.publisher}: found other bytes than were published in {NUM_TRIES} "
            f"tries, expected {content.chunk_bytes(index)} of checksum {content.chunk_sums()[index]:016x}"
        )

    def _client(self, publisher: str) -> Client:
        return Client(lambda: publisher, keys=self._keys, name="publisher")


class _Transfer:
    """One file on its way.

    Attributes:
        key: Which file it is.
        publisher: Who hands it out.
        partial: What of it is there.
        rest: Chunks that nobody has asked for yet.
    """

    def __init__(self, publisher: str, partial: Partial, deadline_s: float) -> None:
        self.key, self.publisher, self.partial = partial.content.key, publisher, partial
        self.rest = deque(sorted(partial.missing))
        self._silence_s = min(SILENCE_S, deadline_s)

    async def ask(self, client: Client, index: int, room: asyncio.Semaphore) -> wire.Chunk:
        """The publisher's answer. Asks again where none comes, each time later: chunks may be slower than was thought.

        Args:
            client: A connection to the publisher.
            index: Which chunk.
            room: Taken by each request.

        Raises:
            RefusedError: It no longer has the file.
            WeightsError: Its answer is malformed.
        """
        with _mentioned(f"{self.key}: chunk {index} from {self.publisher}"):
            while True:
                async with room:
                    silence_s = self._silence_s
                    try:
                        request = wire.ChunkRequest(key=self.key, index=index)
                        return await client.ask_once(request, wire.Chunk, silence_s=silence_s)
                    except SilenceError:
                        self._silence_s = max(self._silence_s, 2 * silence_s)


@contextmanager
def _mentioned(what: str) -> Generator[None]:
    """A publisher's errors say what was asked for."""
    try:
        yield
    except (RefusedError, DeadlineError) as error:
        raise type(error)(f"{what}: {error}") from error
    except WireError as error:
        raise WeightsError(f"{what}: {error}") from error
