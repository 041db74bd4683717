"""Files that are whole or absent."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from common.errors import RunDirectoryError


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Writes `data` to `path` by renaming a finished temporary file; it survives a crash of the machine.

    Raises:
        RunDirectoryError: The disk is full or the directory cannot be written; `path` is as it was.
    """
    with whole_file(path, mode=mode) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path, *, mode: int = 0o644) -> Generator[BinaryIO]:
    """A temporary file that is renamed to `path` when the block ends, and removed when the block fails.

    Raises:
        RunDirectoryError: The disk is full or the directory cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """What was made in a directory, or renamed, survives a crash of the machine from now on.

    Raises:
        OSError: The disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lines:
    """A file of whole lines that one process appends to; an unfinished last one, which a kill left, is cut off first.

    What `write` was given is the kernel's when it returns. A write that fails leaves nothing of its line.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it and its directory.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        self._path = path
        with one_line(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                with path.open("rb+") as file:
                    content = file.read()
                    file.truncate(content.rfind(b"\n") + 1)
            self._file = path.open("ab", buffering=0)

    def write(self, text: str) -> None:
        """Appends the text, all of it or nothing.

        Raises:
            RunDirectoryError: The disk is full.
        """
        rest = text.encode()
        with one_line(self._path):
            size = os.fstat(self._file.fileno()).st_size
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(size)
                raise

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


@contextmanager
def one_line(path: Path) -> Generator[None]:
    """What the system says in the block, as an error that names the path.

    Raises:
        RunDirectoryError: It cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be written: {error.strerror}") from error


def read_private(path: Path) -> bytes:
    """The content of a file that only its owner can read.

    Raises:
        RunDirectoryError: It is missing, or others can read it.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise RunDirectoryError(f"{path}: not found, expected a run directory that the launcher made") from None
    if mode & 0o077:
        raise RunDirectoryError(f"{path}: found mode {mode & 0o777:o}, expected 600: others can read the run's keys")
    return path.read_bytes()


def try_lock(file: IO[Any]) -> bool:
    """Locks the file until it is closed, however that comes about; false where another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
