"""How weights travel: what files a version's parts are made of, and their chunks."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import WireError
from common.versions import Version
from common.wire.base import Message, Natural, Small

CHUNK_BYTES = 1 << 20
_SUM = np.dtype("<u8")


class FileKey(NamedTuple):
    """What a file of weights holds: a part of a version, whole or as a delta.

    Attributes:
        part: Number of the learner rank that hands it out.
        version: The version of the weights that result.
        base: The version that a delta starts from; None where the part is whole.
    """

    part: Small
    version: Version
    base: Version | None

    def __str__(self) -> str:
        """The name of its file."""
        what = "whole" if self.base is None else f"from-{self.base}"
        return f"part-{self.part:05d}.{self.version}.{what}"


class Content(Message):
    """What the bytes of a file of weights are.

    Attributes:
        key: Which file this is.
        size_bytes: Its size.
        sums: uint64 bytes, the xxh3_64 of each chunk of `CHUNK_BYTES`, of which the last one may be shorter.
    """

    key: FileKey
    size_bytes: Natural
    sums: bytes

    @property
    def num_chunks(self) -> int:
        """How many there are."""
        return -(-self.size_bytes // CHUNK_BYTES)

    def chunk_sums(self) -> NDArray[np.uint64]:
        """The checksum of each chunk."""
        return np.frombuffer(self.sums, _SUM)

    def chunk_bytes(self, index: int) -> int:
        """The size of one chunk."""
        return min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES)

    def check(self) -> None:
        """Checks what the types cannot say.

        Raises:
            WireError: There is not one checksum for each chunk.
        """
        if len(self.sums) != self.num_chunks * _SUM.itemsize:
            raise WireError(
                f"found {len(self.sums)} bytes of checksums, expected {_SUM.itemsize} for each of {self.num_chunks}"
            )


class PartRequest(Message):
    """Asks a publisher for its part of `version`; held until that is encoded.

    Attributes:
        version: The version of the weights that is wanted.
        have: The version of the part that the asker holds; None where it holds none.
    """

    version: Version
    have: Version | None


class PartFiles(Message):
    """The files that make a part, in order: deltas on what the asker holds, or a whole one and deltas on that.

    Attributes:
        part: Number of the part.
        files: Empty where the asker holds the version.
    """

    part: Small
    files: tuple[Content, ...]

    def check(self) -> None:
        """Checks what the types cannot say.

        Raises:
            WireError: A file is of another part, does not start from what the one before it makes, or lacks checksums.
        """
        if any(file.key.part != self.part for file in self.files):
            raise WireError(f"found files of other parts, expected those of part {self.part} alone")
        for before, after in zip(self.files, self.files[1:], strict=False):
            if after.key.base != before.key.version:
                raise WireError(f"found {after.key} behind {before.key}, expected a delta from {before.key.version}")
        for file in self.files:
            file.check()


class ChunkRequest(Message):
    """Asks for a chunk of a file."""

    key: FileKey
    index: Small


class Chunk(Message):
    """A chunk of a file; its bytes stay in the message that they came in."""

    data: memoryview
