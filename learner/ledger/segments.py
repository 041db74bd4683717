"""Scored groups on disk: appended to segment files, and freed a file at a time.

What is appended is on its way to the disk, not on it: it survives the end of the process, and the loss of the machine
only after `sync_files`. So each payload has a checksum, and one that is not there as it was is found when it is read.
"""

import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from common.files import one_line, sync_directory

SEGMENT_BYTES = 64 << 20
_SUFFIX = ".groups"


class Place(NamedTuple):
    """Where a payload is.

    Attributes:
        segment: Number of the file.
        offset: Of its first byte.
        size_bytes: Of the payload.
        checksum: CRC-32 of it.
    """

    segment: int
    offset: int
    size_bytes: int
    checksum: int


class Segments:
    """The segment files of a run. A file goes when nothing in it is needed any more.

    Payloads that are stored together are freed together, or nearly: the files hold those that are needed, and what was
    stored between the first and the last of them.
    """

    def __init__(self, directory: Path, places: Iterable[Place], *, read_only: bool = False) -> None:
        """`places` are the payloads that are needed; files without one are left from a killed process, and go."""
        self._directory = directory
        self._num_live = Counter(place.segment for place in places)
        self._unsynced = {self._path(number) for number in self._num_live}  # the process before may have synced none
        self._file: int | None = None
        self._end = 0
        found = self._numbers()
        self._newest = max(found, default=0)
        if not read_only:
            for number in found - self._num_live.keys():
                self._path(number).unlink(missing_ok=True)

    def append(self, payload: bytes) -> Place:
        """Keeps a payload.

        Raises:
            RunDirectoryError: The disk is full, or the directory cannot be written.
        """
        with one_line(self._directory):
            if self._file is None or self._end >= SEGMENT_BYTES:
                self._begin_segment()
            assert self._file is not None
            _write(self._file, payload, self._end)
        place = Place(self._newest, self._end, len(payload), zlib.crc32(payload))
        self._end += len(payload)
        self._num_live[place.segment] += 1
        self._unsynced.add(self._path(place.segment))
        return place

    def read(self, place: Place) -> bytes | None:
        """The payload; None where it is not there as it was."""
        try:
            with self._path(place.segment).open("rb", buffering=0) as file:
                payload = os.pread(file.fileno(), place.size_bytes, place.offset)
        except OSError:
            return None
        return payload if zlib.crc32(payload) == place.checksum else None

    def free(self, places: Iterable[Place]) -> None:
        """Payloads that are no longer needed, which nobody reads any more."""
        for place in places:
            self._num_live[place.segment] -= 1
            if not self._num_live[place.segment]:
                del self._num_live[place.segment]
                if place.segment != self._newest:
                    self._path(place.segment).unlink(missing_ok=True)

    def take_unsynced(self) -> Collection[Path]:
        """Files with payloads that a loss of the machine might lose, for `sync_files`."""
        unsynced, self._unsynced = self._unsynced, set()
        return unsynced

    def is_cut(self, place: Place) -> bool:
        """Whether the payload cannot be whole: its file is missing, or ends before it does."""
        return _size_bytes(self._path(place.segment)) < place.offset + place.size_bytes

    def size_bytes(self) -> int:
        """Of all files."""
        return sum(_size_bytes(self._path(number)) for number in self._numbers())

    def close(self) -> None:
        """Closes the file that is appended to."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _begin_segment(self) -> None:
        """The next file; one of an earlier process is never appended to."""
        full = self._newest
        self.close()
        self._directory.mkdir(exist_ok=True)
        self._newest, self._end = full + 1, 0
        self._file = os.open(self._path(self._newest), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        if full and full not in self._num_live:
            self._path(full).unlink(missing_ok=True)

    def _numbers(self) -> set[int]:
        return {int(path.stem) for path in self._directory.glob(f"*{_SUFFIX}")}

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:06d}{_SUFFIX}"


def sync_files(paths: Collection[Path]) -> None:
    """What is in these files survives a loss of the machine from now on; one that is gone is needed by nobody.

    Raises:
        RunDirectoryError: The disk fails.
    """
    for path in paths:
        with one_line(path), suppress(FileNotFoundError):
            with path.open("rb") as file:
                os.fdatasync(file.fileno())
            sync_directory(path.parent)


def _size_bytes(path: Path) -> int:
    """Of a file that another process may remove at any moment."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _write(file: int, payload: bytes, offset: int) -> None:
    """All of it: a full disk takes a part first, and refuses the rest."""
    view = memoryview(payload)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
