"""Sizes and checksums of a checkpoint's files: written beside it, and checked before it is loaded."""

import errno
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from common.errors import DamageError, RunDirectoryError
from learner.ranks import Ranks

_PIECE_BYTES = 4 << 20


class FileSum(msgspec.Struct, frozen=True, array_like=True):
    """What a file was when it was written.

    Attributes:
        size_bytes: Of the file.
        crc32: Of its content. It finds what a disk does to a file, not what a forger does.
    """

    size_bytes: int
    crc32: int


Sums = dict[str, FileSum]


def sums_of(paths: Iterable[Path]) -> Sums:
    """The size and checksum of each file, by its name.

    Raises:
        RunDirectoryError: One cannot be read.
    """
    return {path.name: _sum_of(path) for path in paths}


def check_files(directory: Path, expected: Mapping[str, FileSum], ranks: Ranks) -> None:
    """Checks the files of a directory; the ranks share the work, and all of them hear of what one finds.

    Raises:
        DamageError: A file is missing, cannot be read, or is not what it was.
        RunDirectoryError: A file may not be read, which says nothing of what it holds.
    """
    by_size = sorted(expected, key=lambda name: (-expected[name].size_bytes, name))
    own = _Found("", "")
    try:
        for name in by_size[ranks.rank :: ranks.size]:
            _check(directory / name, expected[name])
    except DamageError as error:
        own = _Found(damage=str(error), failure="")
    except RunDirectoryError as error:
        own = _Found(damage="", failure=str(error))
    told = [msgspec.msgpack.decode(data, type=_Found) for data in ranks.gather(msgspec.msgpack.encode(own))]
    if failure := next((each.failure for each in told if each.failure), ""):
        raise RunDirectoryError(failure)
    if damage := next((each.damage for each in told if each.damage), ""):
        raise DamageError(damage)


def read_error(path: Path, error: OSError) -> RunDirectoryError:
    """A failure to read a file that a checkpoint has: damage, or only a place that is closed to this process."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) or error.errno == errno.EIO:
        return DamageError(f"{path}: cannot be read: {error.strerror}")
    return RunDirectoryError(f"{path}: cannot be read: {error.strerror}")


class _Found(msgspec.Struct, frozen=True, array_like=True):
    """What a rank says of its files: what is damaged, and what keeps it from looking."""

    damage: str
    failure: str


def _check(path: Path, expected: FileSum) -> None:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise read_error(path, error) from error
    if size_bytes != expected.size_bytes:
        raise DamageError(f"{path}: found {size_bytes} bytes, expected the {expected.size_bytes} that were written")
    if (crc32 := _sum_of(path).crc32) != expected.crc32:
        raise DamageError(f"{path}: found checksum {crc32:08x}, expected the {expected.crc32:08x} of what was written")


def _sum_of(path: Path) -> FileSum:
    """Reads the file; zlib holds no lock meanwhile, so that training goes on beside it."""
    size_bytes, crc32, piece = 0, 0, memoryview(bytearray(_PIECE_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(piece):
                size_bytes, crc32 = size_bytes + size, zlib.crc32(piece[:size], crc32)
    except OSError as error:
        raise read_error(path, error) from error
    return FileSum(size_bytes, crc32)
