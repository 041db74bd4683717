"""A delta: what changed in a part since another version, as one file.

    prefix      magic, format, then offset, size and xxh3_64 of the head
    blocks      each the changes of neighbouring tensors, or of a piece of one (`blocks.py`)
    head        versions, the tensors with the checksum of what results, and size and checksum of each block

The head is behind the blocks, because it is known last; the prefix is written at the end.
"""

import mmap
import struct
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Self

import msgspec
import numpy as np
import xxhash

from common.errors import WeightsError
from common.files import whole_file
from common.versions import Version
from common.weights.blocks import Block
from common.weights.parts import GROUP_BYTES, WORDS, Part, TensorEntry, Word, Words, check_sums, groups, part_sums
from common.weights.streams import pack, unpack
from common.weights.work import in_order

_PREFIX = struct.Struct("<8sIQQQ")
_MAGIC, _FORMAT = b"sluice-d", 2


class DeltaReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a delta came to.

    Attributes:
        size_bytes: Size of its file.
        full_bytes: Size of the part's tensors.
        num_changed: Elements that differ.
        num_elements: Elements of the part.
    """

    size_bytes: int
    full_bytes: int
    num_changed: int
    num_elements: int


class _Head(msgspec.Struct, frozen=True, array_like=True):
    """What a delta says of itself; `sums` go with `entries`."""

    base_version: Version
    version: Version
    entries: list[TensorEntry]
    sums: list[int]
    block_sizes: list[int]
    block_sums: list[int]


class _Span(NamedTuple):
    """A run of words that is coded together: between two bytes of the data, with the tensors that lie in it."""

    start: int
    end: int
    entries: list[TensorEntry]

    @property
    def word(self) -> Word:
        """Of its tensors."""
        return WORDS[self.entries[0].dtype]

    def words(self, part: Part) -> Words:
        """Of a part that has its tensors."""
        return part.span(self.entries[0].dtype, self.start, self.end)


def encode_delta(
    base: Part, new: Part, target: Path, *, base_version: Version, version: Version, num_threads: int = 1
) -> DeltaReport:
    """Writes what changed from `base` to `new`, whole or not at all.

    Beside the mapped parts, each thread holds at most 12 times `GROUP_BYTES`, 48 MiB.

    Raises:
        WeightsError: The parts do not have the same tensors.
        RunDirectoryError: There is no room.
    """
    if base.entries != new.entries:
        raise WeightsError(f"{new.path}: version {version}: found other tensors than {base.path} of {base_version} has")

    def encode(span: _Span) -> tuple[bytes, int]:
        block = Block.between(span.words(base), span.words(new))
        return block.encode(), block.num_changed()

    entries = list(new.entries.values())
    spans = _spans(entries)
    num_changed = 0
    sizes: list[int] = []
    sums: list[int] = []
    with whole_file(target) as file:
        file.write(bytes(_PREFIX.size))
        for data, count in in_order(encode, spans, num_threads):
            file.write(data)
            sizes.append(len(data))
            sums.append(xxhash.xxh3_64_intdigest(data))
            num_changed += count
        results = part_sums(new, num_threads=num_threads)
        head = _Head(base_version, version, entries, list(results.values()), sizes, sums)
        offset, coded = file.tell(), pack([np.frombuffer(msgspec.msgpack.encode(head), np.uint8)])
        file.write(coded)
        size_bytes = file.tell()
        file.seek(0)
        file.write(_PREFIX.pack(_MAGIC, _FORMAT, offset, len(coded), xxhash.xxh3_64_intdigest(coded)))
    return DeltaReport(
        size_bytes=size_bytes,
        full_bytes=new.size_bytes,
        num_changed=num_changed,
        num_elements=sum((e.end - e.start) // WORDS[e.dtype].itemsize for e in entries),
    )


class Delta:
    """A delta that is mapped into memory; what it says of itself is checked, its blocks are when they are read."""

    def __init__(self, path: Path, head: _Head, data: memoryview) -> None:
        self.path = path
        self.base_version = head.base_version
        self.version = head.version
        self.entries = {entry.name: entry for entry in head.entries}
        self.sums = {entry.name: value for entry, value in zip(head.entries, head.sums, strict=True)}
        self._spans = _spans(head.entries)
        self._sizes, self._sums = head.block_sizes, head.block_sums
        self._offsets = list(accumulate(head.block_sizes, initial=_PREFIX.size))
        self._data = data

    @property
    def num_blocks(self) -> int:
        """How many there are to patch."""
        return len(self._spans)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Maps a delta.

        Raises:
            WeightsError: It cannot be read, is truncated, damaged or no delta of this format.
        """
        try:
            with path.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise WeightsError(f"{path}: found an empty file, expected a delta") from error
        return cls(path, _read_head(path, data), data)

    def patch(self, part: Part, index: int) -> None:
        """Makes the new words of one block in place; different blocks may be patched by different threads.

        Raises:
            WeightsError: The file is damaged.
        """
        self._block(index).add_to(self._spans[index].words(part))

    def _block(self, index: int) -> Block:
        span = self._spans[index]
        data = self._data[self._offsets[index] : self._offsets[index + 1]]
        at = f"{self.path}: version {self.version}: tensor {span.entries[0].name}"
        if (found := xxhash.xxh3_64_intdigest(data)) != self._sums[index]:
            raise WeightsError(f"{at}: found a block of checksum {found:016x}, expected {self._sums[index]:016x}")
        try:
            return Block.decode(data, span.word, (span.end - span.start) // span.word.itemsize)
        except ValueError as error:
            raise WeightsError(f"{at}: found a malformed block: {error}") from error


def apply_delta(part: Part, delta: Delta, *, num_threads: int = 1) -> None:
    """Makes the part the delta's version in place, then checks every tensor.

    After an error the part is neither version.

    Raises:
        WeightsError: The part is not of the delta's base, or the delta is damaged: version and tensor are named.
    """
    if part.entries != delta.entries:
        raise WeightsError(f"{part.path}: version {delta.version}: found other tensors than {delta.path} has")

    for _ in in_order(lambda index: delta.patch(part, index), range(delta.num_blocks), num_threads):
        pass
    check_sums(part, delta.sums, delta.version, num_threads=num_threads)


def _spans(entries: list[TensorEntry]) -> list[_Span]:
    """Groups of whole tensors, and pieces of those that are larger."""
    return [
        _Span(start, min(start + GROUP_BYTES, group[-1].end), group)
        for group in groups(entries)
        for start in range(group[0].start, group[-1].end, GROUP_BYTES)
    ]


def _read_head(path: Path, data: memoryview) -> _Head:
    if len(data) < _PREFIX.size or bytes(data[:8]) != _MAGIC:
        raise WeightsError(f"{path}: found {bytes(data[:8])!r} at its head, expected a delta")
    _, version, offset, size, digest = _PREFIX.unpack_from(data)
    if version != _FORMAT:
        raise WeightsError(f"{path}: found a delta of format {version}, expected {_FORMAT}")
    if offset + size != len(data):
        raise WeightsError(f"{path}: found {len(data)} bytes, expected {offset + size}: the delta is truncated")
    coded = data[offset:]
    if xxhash.xxh3_64_intdigest(coded) != digest:
        raise WeightsError(f"{path}: found a damaged head, expected checksum {digest:016x}")
    try:
        (raw,) = unpack(coded)
        head = msgspec.msgpack.decode(raw.data, type=_Head)
    except (ValueError, msgspec.DecodeError) as error:
        raise WeightsError(f"{path}: found a malformed head, expected a delta: {error}") from error
    if _PREFIX.size + sum(head.block_sizes) != offset:
        raise WeightsError(f"{path}: found blocks of {sum(head.block_sizes)} bytes, expected {offset - _PREFIX.size}")
    if not len(head.block_sizes) == len(head.block_sums) == len(_spans(head.entries)):
        raise WeightsError(f"{path}: found {len(head.block_sizes)} blocks, expected {len(_spans(head.entries))}")
    return head
