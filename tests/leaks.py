"""What a process still has open: tasks that nobody finished, sockets that nobody closed."""

import asyncio
import gc
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def nothing_left_open() -> Generator[None]:
    """Checks that a block leaves no task pending and no socket open, whenever the garbage collector may run."""
    before = _open_sockets()
    yield
    gc.collect()
    pending = [found for found in gc.get_objects() if issubclass(type(found), asyncio.Task) and not found.done()]
    assert not pending
    assert not _open_sockets() - before


def _open_sockets() -> set[str]:
    """This process's, by the kernel's names."""
    names: set[str] = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            names.add(str(path.readlink()))
    return {name for name in names if name.startswith("socket:")}
