"""What a process hands out of weights: files, chunk by chunk, to each who asks."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import wire
from common.errors import RefusedError, WeightsError
from common.rendezvous import RunKeys
from common.transport import Handler, Service

NUM_CONNECTIONS = 2  # of each puller
MAX_QUEUED = 32  # chunks on their way to one peer; what is more is dropped, and asked for again by one who reads
BUSY_S = 30.0  # that long after a chunk was asked for, a file counts as being pulled
BUSY_AT_END_S = 2.0  # after its last chunk was
_MAX_REQUEST_BYTES = 1 << 20


def weights_service(handler: Handler, keys: RunKeys, host: str, port: int = 0) -> Service:
    """A service for requests of weights; one who asks and does not read takes `MAX_QUEUED` chunks of memory at most.

    Raises:
        RunDirectoryError: The port is taken.
    """
    limits = {"max_request_bytes": _MAX_REQUEST_BYTES, "max_queued": MAX_QUEUED, "num_io_threads": NUM_CONNECTIONS}
    return Service(handler, keys=keys, host=host, port=port, **limits)


@dataclass(slots=True)
class _File:
    """A file that can be pulled.

    Attributes:
        content: What its bytes are.
        descriptor: The open file.
        busy_until: When it no longer counts as being pulled.
    """

    content: wire.Content
    descriptor: int
    busy_until: float = -math.inf


class Shelf:
    """Files that can be pulled, by their keys; each is open, so that removing its name disturbs nobody.

    Attributes:
        bytes_out: Bytes of chunks that were handed out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_out = 0
        self._clock = clock
        self._files: dict[wire.FileKey, _File] = {}

    def add(self, content: wire.Content, path: Path) -> None:
        """Takes in a file.

        Raises:
            WeightsError: It cannot be read.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
        self.remove(content.key)
        self._files[content.key] = _File(content, descriptor)

    def remove(self, key: wire.FileKey) -> None:
        """Takes out a file."""
        if key in self._files:
            os.close(self._files.pop(key).descriptor)

    def busy(self) -> set[wire.FileKey]:
        """The files that are being pulled."""
        now = self._clock()
        return {key for key, file in self._files.items() if file.busy_until > now}

    def close(self) -> None:
        """Takes out all files."""
        for key in list(self._files):
            self.remove(key)

    def chunk(self, request: wire.ChunkRequest) -> wire.Chunk:
        """A chunk of a file.

        Raises:
            RefusedError: The file is not here, or has no such chunk.
        """
        key, index = request.key, request.index
        if key not in self._files:
            raise RefusedError(f"found no {key} here, expected it to be published still")
        file = self._files[key]
        if index >= file.content.num_chunks:
            raise RefusedError(
                f"{key}: found a request for chunk {index}, expected less than {file.content.num_chunks}"
            )
        is_last = index == file.content.num_chunks - 1
        file.busy_until = self._clock() + (BUSY_AT_END_S if is_last else BUSY_S)
        data = os.pread(file.descriptor, file.content.chunk_bytes(index), index * wire.CHUNK_BYTES)
        self.bytes_out += len(data)
        return wire.Chunk(data=memoryview(data))
