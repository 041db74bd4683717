"""One save under way: written by a thread of each rank, and done when all ranks say so at the same time."""

import time
from pathlib import Path
from threading import Thread

import msgspec

from common.errors import RunDirectoryError, StallError
from learner.ranks import Group, Ranks
from learner.sharded import State, files_of, write
from learner.sums import Sums, sums_of

_LOOK_S = 0.05


class _Progress(msgspec.Struct, frozen=True, array_like=True):
    """What a rank says: its files once they are written, what failed, and whether it has waited too long."""

    files: Sums | None
    error: str
    is_late: bool


class Saving:
    """A state on its way to a directory. All ranks must make the same calls in the same order.

    Attributes:
        path: Of the directory.
        seconds: What writing took on this rank, checksums included; 0 until it is done.
        checksum_s: What the checksums took of it.
        files: Of all ranks, once all have written theirs.
    """

    def __init__(self, state: State, path: Path, ranks: Ranks, group: Group) -> None:
        """Begins to write; `state` belongs to it from now on, and so does `group`."""
        self.path, self.seconds, self.checksum_s = path, 0.0, 0.0
        self.files: Sums = {}
        self._ranks = ranks
        self._error = ""
        self._own: Sums | None = None
        self._thread = Thread(target=self._write, args=(state, group), name="checkpoint", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Whether all ranks have written their parts, as all ranks hear. It waits for none to write.

        Raises:
            RunDirectoryError: A rank cannot.
        """
        return self._agree(late_after_s=None)

    def wait(self, timeout_s: float) -> None:
        """Returns when all ranks have written their parts.

        Raises:
            RunDirectoryError: A rank cannot.
            StallError: They take longer.
        """
        until = time.monotonic() + timeout_s
        self._thread.join(_LOOK_S)
        while not self._agree(late_after_s=timeout_s if time.monotonic() > until else None):
            self._thread.join(_LOOK_S)

    def _agree(self, late_after_s: float | None) -> bool:
        """What all ranks say is heard by all, so that they go on or fail together."""
        own = _Progress(self._own, self._failure(), late_after_s is not None)
        told = [
            msgspec.msgpack.decode(data, type=_Progress) for data in self._ranks.gather(msgspec.msgpack.encode(own))
        ]
        if error := next((each.error for each in told if each.error), ""):
            raise RunDirectoryError(error)
        slow = [rank for rank, each in enumerate(told) if each.files is None]
        if slow and any(each.is_late for each in told):
            ranks = f"rank {slow[0]}" if len(slow) == 1 else f"ranks {', '.join(map(str, slow))}"
            raise StallError(f"the learner waited run.stall_timeout_s for {ranks} to write {self.path}")
        if not slow:
            self.files = {name: found for each in told for name, found in (each.files or {}).items()}
        return not slow

    def _failure(self) -> str:
        died = not self._thread.is_alive() and self._own is None
        return self._error or (f"{self.path}: cannot be written: its thread died, see the learner's log" * died)

    def _write(self, state: State, group: Group) -> None:
        began = time.monotonic()
        try:
            write(self.path, state, group)
            written = time.monotonic()
            files = sums_of(files_of(self.path, self._ranks.rank))
        except RunDirectoryError as error:
            self._error = str(error)
            return
        self.seconds, self.checksum_s = time.monotonic() - began, time.monotonic() - written
        self._own = files
