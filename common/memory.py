"""Directories on memory-backed storage: each is one process's, and goes with it."""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from common.errors import RunDirectoryError
from common.files import try_lock

PREFIX = "sluice-"
_LOCK = ".lock"


class MemoryDirectory:
    """A directory that nobody else removes as long as this process lives. Use as a context manager.

    Its lock is a file beside it, taken before the directory is made: a process that is killed at any moment leaves a
    lock that is free, and nothing without one.

    Attributes:
        path: Absolute; only this user may look into it.
    """

    def __init__(self, path: Path, lock: BinaryIO) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make(cls, parent: Path, name: str) -> Self:
        """Makes a directory of this name and some letters more; what processes of this user left in `parent` goes.

        Raises:
            RunDirectoryError: There is no room, or `parent` cannot be written.
        """
        remove_abandoned(parent)
        try:
            while True:
                descriptor, text = tempfile.mkstemp(_LOCK, f"{PREFIX}{name}-", parent)
                lock = os.fdopen(descriptor, "wb")
                if try_lock(lock) and _is_at(lock, Path(text)):
                    break
                lock.close()  # another process took it for abandoned
            path = Path(text.removesuffix(_LOCK))
            path.mkdir(mode=0o700)
        except OSError as error:
            raise RunDirectoryError(f"weights.dir: {parent}: cannot be written: {error.strerror}") from error
        return cls(path, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Removes it."""
        _remove(self.path)
        self._lock.close()


def remove_abandoned(parent: Path) -> None:
    """Removes this user's directories whose processes are dead, on whatever run they worked: their locks are free."""
    for path in parent.glob(f"{PREFIX}*{_LOCK}"):
        with suppress(OSError):  # another process removes it at this moment
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            with path.open("rb") as lock:
                if try_lock(lock) and _is_at(lock, path):
                    _remove(path.with_name(path.name.removesuffix(_LOCK)))


def _remove(path: Path) -> None:
    """The lock goes last: what is left without its directory is found again, not the other way round."""
    shutil.rmtree(path, ignore_errors=True)
    if not path.exists():
        path.with_name(path.name + _LOCK).unlink(missing_ok=True)


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
