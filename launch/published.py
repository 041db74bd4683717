"""Where the learner publishes weights, on memory-backed storage: there as long as its launcher is, and no longer."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self, TextIO

from common.errors import RunDirectoryError
from common.sections import PUBLISHED
from launch.run_directory import try_lock

LOCK = "lock"


class PublishedWeights:
    """The directory of one run, which this launcher holds the lock of: nobody else removes it as long as it lives."""

    def __init__(self, path: Path, lock: TextIO) -> None:
        self._path = path
        self._lock = lock

    @classmethod
    def claim(cls, path: Path) -> Self:
        """Makes the directory. It gets its name once its lock is held, so that it never looks abandoned.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        try:
            unnamed = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
            lock = (unnamed / LOCK).open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
            unnamed.rename(path)
        except OSError as error:
            raise RunDirectoryError(f"weights.dir: {path}: cannot be written: {error.strerror}") from error
        return cls(path, lock)

    def remove(self) -> None:
        """Removes the directory; the run has ended."""
        shutil.rmtree(self._path, ignore_errors=True)
        self._lock.close()


def remove_abandoned(parent: Path) -> None:
    """Removes the directories of this user's runs whose launchers were killed: their locks are free.

    What this does not do: a directory without a lock stays, for it may be that of a learner without a launcher.
    """
    for path in parent.glob(f"{PUBLISHED}*"):
        with suppress(OSError):  # another launcher removes it at this moment
            if not path.is_symlink() and path.stat().st_uid == os.getuid():
                _remove_if_free(path)


def _remove_if_free(path: Path) -> None:
    with (path / LOCK).open("r+") as lock:
        if try_lock(lock):
            shutil.rmtree(path)
