"""What is left: tasks that nobody finished, sockets that nobody closed, processes that live."""

import asyncio
import gc
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


@contextmanager
def nothing_left_open() -> Generator[None]:
    """Checks that a block leaves no task pending and no socket open, whenever the garbage collector may run."""
    before = _open_sockets()
    yield
    gc.collect()
    pending = [found for found in gc.get_objects() if issubclass(type(found), asyncio.Task) and not found.done()]
    assert not pending
    assert not _open_sockets() - before


def living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that live; one that has ended and that nobody has waited for does not."""
    found: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _open_sockets() -> set[str]:
    """This process's, by the kernel's names."""
    names: set[str] = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            names.add(str(path.readlink()))
    return {name for name in names if name.startswith("socket:")}
