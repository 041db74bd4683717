"""The checkpoints of a run, each a directory that is whole or absent, and checked before it is used.

RUN/checkpoints/step-000050 is that of a policy version; RUN/checkpoints/best links to the best; damaged-step-000050 is
one that was found damaged. In each:

    megatron/       model, optimizer, schedule, random states, whatever the division over ranks
    version.json    the policy version, which commit of the ledger made it, the position in the data, checksums
    accuracy.json   held-out accuracy, the mean over all prompts, where it was the best so far
    huggingface/    the weights for transformers and SGLang, where training ended here

What a save takes from training is the copy to host memory; it is written by a thread, with a process group of its own.
"""

import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import torch

from common import wire
from common.config import Config
from common.errors import RunDirectoryError
from common.files import one_line, sync_directory, write_atomically
from common.log import logger
from common.rendezvous import RunKeys
from common.versions import Version
from learner.export import write_hugging_face
from learner.fallback import Fallback
from learner.ranks import Ranks
from learner.saved import HUGGING_FACE, MEGATRON, VERSION, SavePoint, directories, step_of
from learner.saving import Saving
from learner.sharded import State

_ACCURACY = "accuracy.json"


class Restorable(Protocol):
    """A policy that can be saved and loaded: `learner.megatron.policy.Policy`, or a test's."""

    def snapshot(self) -> State:
        """This rank's part of its state, in memory that nobody changes any more."""
        ...

    def load(self, path: Path) -> None:
        """Goes back to a snapshot that was written to a directory."""
        ...

    def export(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Name and tensor of each Hugging Face weight that this rank hands out."""
        ...


class Saved(NamedTuple):
    """A checkpoint that is whole.

    Attributes:
        path: Of its directory.
        version: Of the weights.
        write_s: What writing it took, beside training.
        checksum_s: What the checksums took of it.
    """

    path: Path
    version: Version
    write_s: float
    checksum_s: float


class Checkpoints:
    """Saves, loads, and keeps the newest few, every so many, and the best.

    Attributes:
        fallback: Chooses the one to load, and knows the damaged ones.
    """

    def __init__(self, config: Config, run_dir: Path, ranks: Ranks) -> None:
        """All ranks must make the same calls in the same order, but `mark_best`, which is the first one's."""
        self._directory = run_dir / "checkpoints"
        self._ranks, self._group = ranks, ranks.new_group()
        self._keep, self._keep_every = config.learner.keep_checkpoints, config.learner.keep_every
        self._patience_s = config.run.stall_timeout_s
        self._model_dir = Path(config.model)
        self._run = RunKeys.load(run_dir).public
        self.fallback = Fallback(self._directory, self._run, ranks)
        self._best = self._directory / "best"
        self._under_way: tuple[SavePoint, Saving] | None = None
        self._awaited: dict[Version, float] = {}

    def load_newest(self, policy: Restorable) -> SavePoint | None:
        """Loads the newest whole checkpoint into the policy; None where there is none.

        Damaged ones are passed over (`fallback`).

        Raises:
            RunDirectoryError: It is of another model, or of another run, or may not be read.
        """
        if (found := self.fallback.find()) is None:
            return None
        path, point = found
        policy.load(path / MEGATRON)
        logger().info("checkpoint_loaded", path=str(path), version=str(point.version), sequence=point.sequence)
        return point

    def save(self, policy: Restorable, version: Version, commit: wire.Committed) -> None:
        """Begins the checkpoint of a version; the one before must have been finished. `look` and `finish` tell more.

        Args:
            policy: It may be trained on as soon as this returns.
            version: Of its weights.
            commit: What the ledger said when they were made; it counts on the first rank.

        Raises:
            RunDirectoryError: The disk is full; what was there before is as it was.
        """
        assert self._under_way is None, "the save before is under way"
        position = {"sequence": commit.sequence, "num_visits": commit.num_visits}
        point = SavePoint(version=version, **position, run=self._run, files={})
        temporary = self._partial(version)
        self._ranks.share(lambda: _make_anew(temporary), bool)
        self._under_way = point, Saving(policy.snapshot(), temporary / MEGATRON, self._ranks, self._group)

    def look(self) -> Saved | None:
        """The save under way, once every rank has written its part: it is whole from now on.

        Raises:
            RunDirectoryError: It cannot be written; what was there before is as it was.
        """
        if self._under_way is None:
            return None
        with self._leaving_nothing(self._under_way[0]):
            return self._commit(*self._under_way) if self._under_way[1].is_done() else None

    def finish(self) -> Saved | None:
        """Waits for the save under way; None where there is none.

        Raises:
            RunDirectoryError: It cannot be written; what was there before is as it was.
            StallError: It takes longer than `run.stall_timeout_s`.
        """
        if self._under_way is None:
            return None
        with self._leaving_nothing(self._under_way[0]):
            self._under_way[1].wait(self._patience_s)
            return self._commit(*self._under_way)

    def write_hugging_face(self, policy: Restorable, number: int) -> Path | None:
        """Adds the Hugging Face form to the checkpoint of a step and returns its path; None where there is none.

        Raises:
            RunDirectoryError: The disk is full; nothing is left of it.
        """
        path = self._path(Version(0, number))
        if not (path / VERSION).exists():
            return None
        weights = path / HUGGING_FACE
        if not weights.exists():
            write_hugging_face(policy.export(), self._model_dir, weights, self._ranks)
        return weights

    def mark_best(self, version: Version, accuracy: float) -> None:
        """Links `best` to the checkpoint of a version, where there is one and no better one has been marked.

        Raises:
            RunDirectoryError: The directory cannot be written, or a file in it is broken.
        """
        if self._under_way is not None and self._under_way[0].version == version:
            self._awaited[version] = accuracy
            return
        if not self._has(version) or not accuracy >= self._best_accuracy():
            return
        write_atomically(self._path(version) / _ACCURACY, msgspec.json.encode(accuracy))
        temporary = self._best.with_name(".best")
        with one_line(self._best):
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(self._path(version).name)
            temporary.replace(self._best)
            sync_directory(self._directory)

    def _best_accuracy(self) -> float:
        """Of the checkpoint that `best` links to; -1 where there is none."""
        path = self._best / _ACCURACY
        try:
            return msgspec.json.decode(path.read_bytes(), type=float)
        except FileNotFoundError:
            return -1.0
        except (OSError, msgspec.MsgspecError) as error:
            raise RunDirectoryError(f"{path}: found no accuracy in it: {error}") from error

    def _commit(self, point: SavePoint, saving: Saving) -> Saved:
        """Makes the checkpoint whole, forgets others, and marks it where its evaluation is in already."""
        self._under_way = None
        whole = msgspec.structs.replace(point, files=saving.files)
        self._ranks.share(lambda: self._make_whole(whole), bool)
        return Saved(self._path(point.version), point.version, saving.seconds, saving.checksum_s)

    def _make_whole(self, point: SavePoint) -> bool:
        temporary, path = self._partial(point.version), self._path(point.version)
        with one_line(path):
            sync_directory(temporary / MEGATRON)
            point.write(temporary)
            temporary.rename(path)
            sync_directory(self._directory)
        if (accuracy := self._awaited.pop(point.version, None)) is not None:
            self.mark_best(point.version, accuracy)
        self._forget()
        return True

    @contextmanager
    def _leaving_nothing(self, point: SavePoint) -> Generator[None]:
        try:
            yield
        except RunDirectoryError:
            self._under_way = None
            if self._ranks.is_first:
                shutil.rmtree(self._partial(point.version), ignore_errors=True)
            raise

    def _has(self, version: Version) -> bool:
        path = self._path(version)
        return (path / VERSION).exists() and SavePoint.read(path).version == version

    def _path(self, version: Version) -> Path:
        return self._directory / f"step-{version.number:06d}"

    def _partial(self, version: Version) -> Path:
        return self._directory / f".step-{version.number:06d}.partial"

    def _forget(self) -> None:
        """Removes those that are not kept; one that is half removed has the name of one that is half written."""
        best = self._best.resolve() if self._best.is_symlink() else None
        for path in directories(self._directory)[: -self._keep]:
            is_kept = self._keep_every and step_of(path) % self._keep_every == 0
            if path == best or is_kept:
                continue
            partial = self._directory / f".{path.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            with one_line(path):
                path.rename(partial)
            shutil.rmtree(partial, ignore_errors=True)


def _make_anew(path: Path) -> bool:
    with one_line(path):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    return True
