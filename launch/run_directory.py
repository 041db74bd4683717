"""The run directory: claimed by one launcher, for one run."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Self, TextIO

from common.config import Config
from common.errors import RunDirectoryError
from common.files import try_lock
from launch.plan import REPOSITORY

LOCK = "launcher.lock"
_SPARE_BYTES = 64 << 10


class RunDirectory:
    """A directory that this launcher holds the lock of; other launchers are refused as long as it lives.

    Attributes:
        path: Absolute.
    """

    def __init__(self, path: Path, lock: TextIO, *, is_new: bool, has_run: bool) -> None:
        self.path = path
        self._lock = lock
        self._is_new = is_new
        self._has_run = has_run

    @classmethod
    def claim(cls, path: Path, *, has_run: bool) -> Self:
        """Makes the directory, or takes an empty one, or one with a run that goes on.

        Raises:
            RunDirectoryError: It is in use, holds something else, or cannot be written.
        """
        is_new = not path.exists()
        if not has_run:
            check_unused(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / LOCK).open("w")
        except OSError as error:
            raise RunDirectoryError(f"run.dir: {path}: cannot be written: {error.strerror}") from error
        if not try_lock(lock):
            lock.close()
            raise _in_use(path)
        return cls(path, lock, is_new=is_new, has_run=has_run)

    def discard(self) -> None:
        """Empties the directory, and removes it where this launcher made it; one with a run is left as it is."""
        if self._has_run:
            self._lock.close()
            return
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        if self._is_new:
            self.path.rmdir()
        self._lock.close()

    def release(self) -> None:
        """Gives up the lock; the run has ended."""
        self._lock.close()


def run_path(config: Config) -> Path:
    """`run.dir`, or `runs/NAME` in the repository.

    Raises:
        RunDirectoryError: The name is no name of a directory.
    """
    if config.run.dir:
        return Path(config.run.dir)
    name = time.strftime(config.run.name)
    if not name or name in (".", "..") or "/" in name:
        raise RunDirectoryError(f"run.name: found {name!r}, expected the name of a directory in runs/")
    return REPOSITORY / "runs" / name


def check_unused(path: Path) -> None:
    """Checks that a run may begin in `path`, and leaves no trace there.

    Raises:
        RunDirectoryError: It is in use, holds something already, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"run.dir: {path}: found a file, expected a new or empty directory")
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"run.dir: {path}: {existing} cannot be written, expected a directory that can")
    if existing != path or not any(path.iterdir()):
        return
    if (path / LOCK).exists():
        with (path / LOCK).open("r") as lock:
            if not try_lock(lock):
                raise _in_use(path)
        raise RunDirectoryError(
            f"run.dir: {path}: found a run that has ended, expected a new or empty directory, or run.resume=auto"
        )
    raise RunDirectoryError(f"run.dir: {path}: found other files, expected a new or empty directory")


def check_free(path: Path) -> None:
    """Checks that no launcher is at work in the directory of a run.

    Raises:
        RunDirectoryError: One is, or the directory cannot be written.
    """
    if not os.access(path, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"run.dir: {path}: cannot be written, expected a directory that can")
    if (path / LOCK).exists():
        with (path / LOCK).open("r") as lock:
            if not try_lock(lock):
                raise _in_use(path)


def check_space(path: Path) -> None:
    """Checks that the directory of a run takes a little more: a process that finds it full may not be able to say so.

    Raises:
        RunDirectoryError: It does not.
    """
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(_SPARE_BYTES))
    except OSError as error:
        raise RunDirectoryError(f"run.dir: {path}: cannot be written: {error.strerror}") from error


def _in_use(path: Path) -> RunDirectoryError:
    return RunDirectoryError(f"run.dir: {path}: found a run at work there, expected none")
