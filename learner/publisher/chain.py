"""The versions of one part that can be pulled: whole ones every so often, and the deltas between."""

import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from common import wire
from common.errors import RefusedError, RunDirectoryError
from common.log import logger
from common.versions import Version
from common.weights.delta import DeltaReport, encode_delta
from common.weights.partial import describe
from common.weights.parts import Part
from learner.publisher.reports import PARTIAL, WHOLE, Encoded

_MAX_DELTA_SHARE = 3 / 4  # of the whole part: a larger delta is not worth its memory
_TWO_ANCHORS = 2.0


class Stored(NamedTuple):
    """A file that can be pulled."""

    content: wire.Content
    path: Path


class NewVersion(NamedTuple):
    """What was made of a version.

    Attributes:
        path: File of the whole part.
        whole: The same where the version is an anchor.
        delta: What changed since the version before; None where there is none that is worth its memory.
        report: For the learner.
    """

    path: Path
    whole: Stored | None
    delta: Stored | None
    report: Encoded


class Chain:
    """Anchors, which are whole, and deltas, each from the version before; together no more than `retention` parts.

    Beside these there is the newest version, which the next delta starts from. A puller whose file is gone finds its
    version, or a newer one, in the newest anchor and the deltas after it, which always stay.

    Attributes:
        newest: The version that was added last.
    """

    def __init__(self, directory: Path, part: int, *, anchor_every: int, retention: float, num_threads: int) -> None:
        """The files are in `directory`, which has nothing else; `retention` is 2 at least: two anchors."""
        self._directory, self._part = directory, part
        self._anchor_every, self._retention, self._num_threads = anchor_every, retention, num_threads
        self._anchors: dict[Version, Stored] = {}
        self._deltas: dict[Version, Stored] = {}
        self._newest_path = Path()
        self.newest: Version | None = None

    def encode(self, version: Version, path: Path) -> NewVersion:
        """Makes what can be pulled of a version; it may run beside the other calls, in a thread.

        Where there is no room for a delta, the version becomes an anchor without one.

        Raises:
            WeightsError: The file is no part, or has other tensors than the one before.
        """
        began = time.monotonic()
        with Part.open(path) as part:
            delta, report = self._delta(version, part)
            full_bytes = part.size_bytes
        whole = None if delta and self._has_room_for(delta, full_bytes) else self._stored(version, None, path)
        encoded = Encoded(
            version=version,
            is_anchor=whole is not None,
            delta_bytes=delta.content.size_bytes if delta else 0,
            full_bytes=full_bytes,
            num_changed=report.num_changed if report else 0,
            num_elements=report.num_elements if report else 0,
            seconds=time.monotonic() - began,
        )
        return NewVersion(path, whole, delta, encoded)

    def add(self, new: NewVersion, busy: Collection[wire.FileKey] = ()) -> list[Stored]:
        """Takes a version in; returns what goes for it, and removes the files of that.

        Args:
            new: The version.
            busy: Files that are being pulled; these anchors go last.
        """
        left = self._newest_path if self.newest is not None and self.newest not in self._anchors else None
        version = new.report.version
        if new.whole is not None:
            self._anchors[version] = new.whole
        if new.delta is not None:
            self._deltas[version] = new.delta
        self.newest, self._newest_path = version, new.path
        gone = self._evict(new.report.full_bytes, busy)
        for path in [stored.path for stored in gone] + ([left] if left else []):
            path.unlink(missing_ok=True)
        return gone

    def files(self, version: Version, have: Version | None) -> list[Stored]:
        """What makes the part of one who has `have`, in order: the fewest bytes that do.

        Raises:
            RefusedError: It is gone.
        """
        deltas: list[Stored] = []
        at, found, cost = version, None, float("inf")
        while True:
            num_bytes = sum(stored.content.size_bytes for stored in deltas)
            if at == have and num_bytes <= cost:
                return deltas
            if at in self._anchors and num_bytes + self._anchors[at].content.size_bytes < cost:
                found = [self._anchors[at], *deltas]
                cost = num_bytes + self._anchors[at].content.size_bytes
            base = self._deltas[at].content.key.base if at in self._deltas else None
            if base is None:
                break
            deltas, at = [self._deltas[at], *deltas], base
        if found is None:
            raise RefusedError(f"part {self._part}: found version {self.newest} published, expected {version}")
        return found

    def _has_room_for(self, delta: Stored, full_bytes: int) -> bool:
        """Whether the chain from the newest anchor may grow by a delta, with room for another anchor."""
        anchored = [delta, *(stored for made, stored in self._deltas.items() if made > max(self._anchors))]
        is_full = _size(anchored) > (self._retention - _TWO_ANCHORS) * full_bytes
        return len(anchored) < self._anchor_every and not is_full

    def _evict(self, full_bytes: int, busy: Collection[wire.FileKey]) -> list[Stored]:
        """Drops files until what is left fits: the oldest anchor with what leads to it, else the oldest delta.

        What joiners need stays, and the newest delta, which all others need. An anchor that is being pulled goes when
        nothing else can, and the oldest of these last: it is the one that will be through first.
        """
        gone: list[Stored] = []
        while _size([*self._anchors.values(), *self._deltas.values()]) > self._retention * full_bytes:
            newest = max(self._anchors)
            older = [version for version in self._anchors if version != newest]
            idle = [version for version in older if self._anchors[version].content.key not in busy]
            deltas = [version for version in self._deltas if version <= newest and version != self.newest]
            if idle:
                going = min(idle)
                leading = [v for v in deltas if v <= going] if going == min(self._anchors) else []
                gone += [self._anchors.pop(going), *map(self._deltas.pop, leading)]
            elif deltas:
                gone.append(self._deltas.pop(min(deltas)))
            elif older:
                gone.append(self._anchors.pop(max(older)))
            else:
                break
        return gone

    def _delta(self, version: Version, part: Part) -> tuple[Stored | None, DeltaReport | None]:
        if self.newest is None:
            self._remove_what_was_left(version)
            return None, None
        path = self._directory / str(wire.FileKey(self._part, version, self.newest))
        try:
            with Part.open(self._newest_path) as base:
                report = encode_delta(
                    base, part, path, base_version=self.newest, version=version, num_threads=self._num_threads
                )
        except RunDirectoryError as error:
            logger().warning("delta_left_out", version=str(version), reason=str(error))
            return None, None
        if report.size_bytes > _MAX_DELTA_SHARE * report.full_bytes:
            path.unlink()
            return None, report
        return self._stored(version, self.newest, path), report

    def _remove_what_was_left(self, version: Version) -> None:
        """Removes what a publisher before this one left; the learner may have written newer versions, or be at it."""
        for path in self._directory.iterdir():
            is_whole = path.suffix == WHOLE
            if not path.name.endswith(PARTIAL) and not (is_whole and Version.parse(path.stem) >= version):
                path.unlink(missing_ok=True)

    def _stored(self, version: Version, base: Version | None, path: Path) -> Stored:
        return Stored(describe(wire.FileKey(self._part, version, base), path), path)


def _size(files: list[Stored]) -> int:
    return sum(stored.content.size_bytes for stored in files)
