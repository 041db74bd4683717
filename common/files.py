"""Files that are whole or absent."""

import os
from pathlib import Path
from typing import TextIO

from common.errors import RunDirectoryError


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Writes `data` to `path` by renaming a finished temporary file; it survives a crash of the machine.

    Raises:
        RunDirectoryError: The disk is full or the directory cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunDirectoryError(f"{path}: cannot be written: {error.strerror}") from error


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


def append_lines(path: Path) -> TextIO:
    """The file, to append whole lines to; an unfinished last one, which a killed process left, is cut off."""
    if path.exists():
        with path.open("rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    return path.open("a", buffering=1)


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
