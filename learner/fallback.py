"""The newest whole checkpoint, and the damaged ones that were passed over for it."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from common.errors import DamageError, RunDirectoryError
from common.log import DAMAGED, logger
from learner.ranks import Ranks
from learner.saved import MEGATRON, VERSION, SavePoint, directories
from learner.sums import check_files

_NUM_KEPT = 2


class _Candidate(msgspec.Struct, frozen=True):
    """A directory with the name of a checkpoint: what it says of itself, or why it cannot be used."""

    name: str
    point: SavePoint | None
    damage: str


class Fallback:
    """Chooses the checkpoint that a run goes on from. All ranks must make the same calls in the same order."""

    def __init__(self, directory: Path, run: str, ranks: Ranks) -> None:
        """`directory` has the checkpoints of the run with the public key `run`."""
        self._directory, self._run, self._ranks = directory, run, ranks
        self._damaged: list[_Candidate] = []
        self._chosen = ""

    def find(self) -> tuple[Path, SavePoint] | None:
        """The newest whole checkpoint and what it says of itself, as all ranks agree; None where there is none.

        Every file was read again and has the checksum that it was written with. Damaged checkpoints are passed over,
        and stay where they are until `set_aside`.

        Raises:
            RunDirectoryError: It is of another run, or may not be read.
        """
        self._damaged, self._chosen = [], ""
        for candidate in self._ranks.share(self._candidates, list[_Candidate]):
            try:
                point = self._checked(candidate)
            except DamageError as error:
                self._damaged.append(msgspec.structs.replace(candidate, damage=str(error)))
                continue
            self._chosen = candidate.name
            return self._directory / candidate.name, point
        return None

    @contextmanager
    def naming_damage(self) -> Generator[None]:
        """An error in the block says also that newer checkpoints are damaged, where they are.

        Raises:
            RunDirectoryError: That of the block.
        """
        try:
            yield
        except RunDirectoryError as error:
            if not self._damaged:
                raise
            names = ", ".join(each.name for each in self._damaged)
            raise RunDirectoryError(
                f"{self._directory}: found damage in {names} ({self._damaged[0].damage}) and no whole checkpoint that "
                f"the ledger can go on from: {error}"
            ) from error

    def set_aside(self) -> None:
        """Gives the damaged checkpoints another name, and says so; the newest few are kept for people.

        To be called once the ledger has agreed to go on without them: where it does not, everything stays as it is.

        Raises:
            RunDirectoryError: They cannot be renamed.
        """
        self._ranks.share(self._rename, bool)
        self._damaged = []

    def _candidates(self) -> list[_Candidate]:
        """Newest first; what dead processes have half written or half removed goes."""
        for partial in self._directory.glob(".step-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        found = []
        for path in reversed(directories(self._directory)):
            try:
                found.append(_Candidate(path.name, SavePoint.read(path), ""))
            except DamageError as error:
                found.append(_Candidate(path.name, None, str(error)))
        return found

    def _checked(self, candidate: _Candidate) -> SavePoint:
        path, point = self._directory / candidate.name, candidate.point
        if point is None:
            raise DamageError(candidate.damage)
        if point.run != self._run:
            raise RunDirectoryError(
                f"{path / VERSION}: found a checkpoint of run {point.run[:8]}, expected one of {self._run[:8]}, "
                "which this directory is of"
            )
        check_files(path / MEGATRON, point.files, self._ranks)
        return point

    def _rename(self) -> bool:
        for candidate in reversed(self._damaged):
            path = self._directory / candidate.name
            aside = path.with_name(f"damaged-{path.name}")
            try:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                os.utime(aside)
            except OSError as error:
                raise RunDirectoryError(f"{path}: cannot be renamed: {error.strerror}") from error
            instead, damage = self._chosen or "the starting weights", candidate.damage
            logger().warning(DAMAGED, checkpoint=path.name, damage=damage, instead=instead, kept_as=aside.name)
        self._tidy()
        return True

    def _tidy(self) -> None:
        """Old damage goes, and a link to what has another name now."""
        best = self._directory / "best"
        if best.is_symlink() and not best.exists():
            best.unlink()
        aside = sorted(self._directory.glob("damaged-*"), key=lambda path: path.stat().st_mtime_ns)
        for old in aside[:-_NUM_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
