"""A part: the tensors that one learner rank hands out of a version, as one safetensors file, and their checksums."""

import json
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from common.errors import WeightsError
from common.versions import Version
from common.weights.work import in_order

DType = Literal["BF16", "F32"]
Words = NDArray[Any]  # uint16 or uint32: the bits of bfloat16 or float32
Word = np.dtype[Any]
WORDS: dict[DType, Word] = {"BF16": np.dtype("<u2"), "F32": np.dtype("<u4")}
GROUP_BYTES = 4 << 20  # part of the delta's format
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor lies.

    Attributes:
        name: As in the Hugging Face directory.
        dtype: As safetensors writes it.
        shape: Shape of the tensor.
        start: First byte within the data, which follows the header.
        end: Byte behind the last.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    end: int


class _Described(msgspec.Struct):
    """A tensor in a safetensors header."""

    dtype: DType
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


class Part:
    """A part that is mapped into memory: nothing of it is read before it is looked at.

    A mapping ends with the last view of it, so that `close` never pulls memory from under one. A file that is truncated
    while it is mapped kills the process that looks at it (SIGBUS): whoever replaces a part writes a new file.
    """

    def __init__(self, path: Path, entries: dict[str, TensorEntry], data: NDArray[np.uint8]) -> None:
        self.path = path
        self.entries = entries
        self._data = data

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Self:
        """Maps a safetensors file of bfloat16 and float32 tensors.

        Raises:
            WeightsError: It cannot be read, or is no such file.
        """
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        try:
            with path.open("rb+" if writable else "rb") as file:
                mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=access), np.uint8)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise WeightsError(f"{path}: found an empty file, expected a safetensors file") from error
        header_bytes = int.from_bytes(mapped[:8].tobytes(), "little")
        if header_bytes > min(_MAX_HEADER_BYTES, mapped.size - 8):
            raise WeightsError(f"{path}: found {mapped.size} bytes that begin with no header, expected safetensors")
        data = mapped[8 + header_bytes :]
        return cls(path, _read_header(path, mapped[8 : 8 + header_bytes].tobytes(), data.size), data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size_bytes(self) -> int:
        """Of the tensors, without the header."""
        return self.entries[next(reversed(self.entries))].end if self.entries else 0

    def words(self, name: str) -> Words:
        """The tensor's bits, flat: a view of the file, which can be written where the part is writable."""
        entry = self.entries[name]
        return self.span(entry.dtype, entry.start, entry.end)

    def span(self, dtype: DType, start: int, end: int) -> Words:
        """The words between two bytes of the data, of as many tensors as lie there."""
        return self._data[start:end].view(WORDS[dtype])

    def bytes(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, a view of the file."""
        entry = self.entries[name]
        return self._data[entry.start : entry.end]

    def close(self) -> None:
        """Lets go of the file."""
        self._data = np.empty(0, np.uint8)


def part_header(tensors: Sequence[tuple[str, DType, tuple[int, ...]]]) -> tuple[bytes, list[TensorEntry]]:
    """What a part's file begins with, and where its tensors lie behind that: without gaps, float32 first.

    So every tensor is aligned to its words, and the data begins at a multiple of 8 bytes.
    """
    entries: list[TensorEntry] = []
    at = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: tensor[1] != "F32"):
        end = at + math.prod(shape) * WORDS[dtype].itemsize
        entries.append(TensorEntry(name, dtype, tuple(shape), at, end))
        at = end
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    head |= {e.name: {"dtype": e.dtype, "shape": e.shape, "data_offsets": (e.start, e.end)} for e in entries}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, entries


def groups(entries: Iterable[TensorEntry]) -> list[list[TensorEntry]]:
    """Neighbours of one dtype, of `GROUP_BYTES` at most, and each larger tensor alone: pieces of work of like size."""
    found: list[list[TensorEntry]] = []
    for entry in entries:
        last = found[-1] if found else None
        if last is None or last[0].dtype != entry.dtype or entry.end - last[0].start > GROUP_BYTES:
            found.append([entry])
        else:
            last.append(entry)
    return found


def tensor_sum(words: Words) -> int:
    """The xxh3_64 of a tensor's bytes."""
    return xxhash.xxh3_64_intdigest(words.data)


def part_sums(part: Part, *, num_threads: int = 1) -> dict[str, int]:
    """The checksum of each tensor."""

    def sums(group: list[TensorEntry]) -> list[tuple[str, int]]:
        return [(entry.name, tensor_sum(part.words(entry.name))) for entry in group]

    return dict(pair for pairs in in_order(sums, groups(part.entries.values()), num_threads) for pair in pairs)


def check_sums(part: Part, sums: Mapping[str, int], version: Version, *, num_threads: int = 1) -> None:
    """Checks that a part has these tensors, each with its checksum.

    Raises:
        WeightsError: One is missing or differs.
    """
    found = part_sums(part, num_threads=num_threads)
    for name in found.keys() ^ sums.keys():
        where = "the checksums" if name in found else "the part"
        raise WeightsError(f"{part.path}: version {version}: tensor {name} is not in {where}")
    for name, value in found.items():
        if value != sums[name]:
            raise WeightsError(
                f"{part.path}: version {version}: tensor {name}: found checksum {value:016x}, "
                f"expected {sums[name]:016x}"
            )


def _read_header(path: Path, text: bytes, size_bytes: int) -> dict[str, TensorEntry]:
    """The tensors in the order in which they lie.

    Raises:
        WeightsError: The header is malformed, or the data has gaps or another size.
    """
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        described = {name: msgspec.json.decode(value, type=_Described) for name, value in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: found no safetensors header of BF16 and F32 tensors: {error}") from error
    entries: dict[str, TensorEntry] = {}
    at = 0
    for name, tensor in sorted(described.items(), key=lambda item: item[1].data_offsets):
        end = at + math.prod(tensor.shape) * WORDS[tensor.dtype].itemsize
        if tensor.data_offsets != (at, end):
            raise WeightsError(f"{path}: tensor {name}: found bytes {tensor.data_offsets}, expected {(at, end)}")
        entries[name] = TensorEntry(name, tensor.dtype, tensor.shape, at, end)
        at = end
    if at != size_bytes:
        raise WeightsError(f"{path}: found {size_bytes} bytes of data, expected {at}")
    return entries
