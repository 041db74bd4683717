"""Publishers of files of weights, for the tests of how they come."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from common import wire
from common.rendezvous import RunKeys
from common.transport import Handler, Service
from common.versions import Version
from common.weights.partial import describe
from common.weights.pulling import Puller
from common.weights.shelf import Shelf, weights_service
from tests.clocks import PATIENCE_S

KEY = wire.FileKey(3, Version(0, 7), Version(0, 6))
CHUNK = wire.CHUNK_BYTES


def file_of(path: Path, size_bytes: int) -> wire.Content:
    path.write_bytes(os.urandom(size_bytes))
    return describe(KEY, path)


@asynccontextmanager
async def serving(handle: Handler, keys: RunKeys, port: int = 0) -> AsyncGenerator[Service]:
    async with weights_service(handle, keys, "127.0.0.1", port) as service:
        task = asyncio.create_task(service.serve())
        try:
            yield service
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def publisher(
    keys: RunKeys, content: wire.Content, path: Path, port: int = 0
) -> AsyncGenerator[tuple[Shelf, str]]:
    """A shelf with one file, and where it is handed out."""
    shelf = Shelf()
    shelf.add(content, path)

    async def handle(peer: bytes, request: wire.Request) -> wire.Message:
        del peer
        assert isinstance(request, wire.ChunkRequest)
        return shelf.chunk(request)

    async with serving(handle, keys, port) as service:
        yield shelf, service.endpoint
    shelf.close()


def puller_of(keys: RunKeys, deadline_s: float = PATIENCE_S) -> Puller:
    return Puller(keys, deadline_s=deadline_s)


async def until(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < give_up, f"waited {PATIENCE_S:g} s in vain"
        await asyncio.sleep(0.001)
