"""A file on its way: which of its chunks are there, and where they are kept until all are."""

import os
import weakref
from pathlib import Path
from typing import Self

import numpy as np
import xxhash

from common import wire
from common.files import one_line

_SUFFIX = ".partial"


class Partial:
    """A file that is pulled, beside the place where it will stand.

    Which chunks are there is known by their checksums alone: a file whose pull was broken off is taken up again by
    reading it, and what is damaged in it, or belongs to another file, is pulled anew.

    Attributes:
        content: What the file will be.
        missing: Chunks that are not there.
    """

    def __init__(self, content: wire.Content, path: Path, descriptor: int, missing: set[int]) -> None:
        self.content, self.missing = content, missing
        self._path, self._descriptor = path, descriptor
        self._finalize = weakref.finalize(self, os.close, descriptor)
        self._sums = content.chunk_sums()

    @classmethod
    def open(cls, content: wire.Content, path: Path) -> Self:
        """Takes up what there is of the file that will stand at `path`, or begins it.

        Raises:
            RunDirectoryError: It cannot be written, or there is no room.
        """
        temporary = _hidden(path)
        with one_line(path):
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                was_begun = os.fstat(descriptor).st_size == content.size_bytes
                os.ftruncate(descriptor, content.size_bytes)
                if content.size_bytes:
                    os.posix_fallocate(descriptor, 0, content.size_bytes)
            except OSError:
                os.close(descriptor)
                temporary.unlink()
                raise
        partial = cls(content, path, descriptor, set(range(content.num_chunks)))
        if was_begun:
            partial.missing = {i for i in partial.missing if not partial.fits(i, partial.read(i))}
        return partial

    def fits(self, index: int, data: bytes | memoryview) -> bool:
        """Whether these are the bytes of a chunk."""
        right_size = len(data) == self.content.chunk_bytes(index)
        return right_size and xxhash.xxh3_64_intdigest(data) == self._sums[index]

    def read(self, index: int) -> bytes:
        """A chunk, or whatever is in its place."""
        return os.pread(self._descriptor, self.content.chunk_bytes(index), index * wire.CHUNK_BYTES)

    def put(self, index: int, data: memoryview) -> bool:
        """Puts a chunk in its place, where it fits, and says whether it did.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        if not self.fits(index, data):
            return False
        with one_line(self._path):
            os.pwrite(self._descriptor, data, index * wire.CHUNK_BYTES)
        self.missing.discard(index)
        return True

    def finish(self) -> None:
        """Gives the file its name: it is whole.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        assert not self.missing
        with one_line(self._path):
            _hidden(self._path).rename(self._path)

    def close(self) -> None:
        """Lets go of the file."""
        self._finalize()


def describe(key: wire.FileKey, path: Path) -> wire.Content:
    """What the bytes of a file are.

    Raises:
        RunDirectoryError: It cannot be read.
    """
    sums: list[int] = []
    with one_line(path), path.open("rb", buffering=0) as file:
        chunk = bytearray(wire.CHUNK_BYTES)
        while size := file.readinto(chunk):
            sums.append(xxhash.xxh3_64_intdigest(memoryview(chunk)[:size]))
        size_bytes = file.tell()
    return wire.Content(key=key, size_bytes=size_bytes, sums=np.array(sums, "<u8").tobytes())


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}{_SUFFIX}")
