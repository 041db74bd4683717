"""The checkpoints of a run, each a directory that is whole or absent.

RUN/checkpoints/step-000050 is that of a policy version; RUN/checkpoints/best links to the best. In each:

    megatron/       model, optimizer, schedule, random states
    huggingface/    the same weights, for transformers and SGLang
    version.json    the policy version
    accuracy.json   held-out accuracy, the mean over all prompts, where it was the best so far
"""

import shutil
from pathlib import Path

import msgspec

from common.config import Config
from common.errors import RunDirectoryError
from common.files import write_atomically
from common.log import logger
from common.versions import Version
from learner.export import write_hugging_face
from learner.megatron.policy import Policy
from learner.ranks import Ranks

_VERSION = "version.json"
_ACCURACY = "accuracy.json"
HUGGING_FACE = "huggingface"
_MEGATRON = "megatron"


class Checkpoints:
    """Saves, loads, and keeps the newest few and the best."""

    def __init__(self, config: Config, run_dir: Path, ranks: Ranks) -> None:
        self._directory = run_dir / "checkpoints"
        self._ranks = ranks
        self._keep = config.learner.keep_checkpoints
        self._model_dir = Path(config.model)
        self._best = self._directory / "best"

    def load_newest(self, policy: Policy) -> Version | None:
        """Loads the newest whole checkpoint into the policy and returns its version; None where there is none."""
        for path in reversed(self._whole()):
            policy.load(path / _MEGATRON)
            version = msgspec.json.decode((path / _VERSION).read_bytes(), type=Version)
            logger().info("checkpoint_loaded", path=str(path), version=str(version))
            return version
        return None

    def save(self, policy: Policy, version: Version) -> Path:
        """Writes the checkpoint of a version, on all ranks, and returns the path of its Hugging Face form.

        Raises:
            RunDirectoryError: The disk is full; what was there before is as it was.
        """
        path = self._path(version)
        temporary = path.with_name(f".{path.name}.partial")
        try:
            if self._ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self._ranks.wait()
            policy.save(temporary / _MEGATRON)
            weights = temporary / HUGGING_FACE
            write_hugging_face(policy.export(), self._model_dir, weights, self._ranks, whole_model=True)
            if self._ranks.is_first:
                (temporary / _VERSION).write_bytes(msgspec.json.encode(version))
                shutil.rmtree(path, ignore_errors=True)
                temporary.rename(path)
                self._forget()
            self._ranks.wait()
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunDirectoryError(f"{path}: cannot be written: {error.strerror or error}") from error
        return path / HUGGING_FACE

    def has(self, version: Version) -> bool:
        """Whether the version has a checkpoint."""
        path = self._path(version) / _VERSION
        return path.exists() and msgspec.json.decode(path.read_bytes(), type=Version) == version

    def mark_best(self, version: Version, accuracy: float) -> None:
        """Links `best` to the checkpoint of a version, where there is one and no better one has been marked."""
        best = self._best / _ACCURACY
        best_accuracy = msgspec.json.decode(best.read_bytes(), type=float) if best.exists() else -1.0
        if not self.has(version) or not accuracy >= best_accuracy:
            return
        write_atomically(self._path(version) / _ACCURACY, msgspec.json.encode(accuracy))
        temporary = self._best.with_name(".best")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self._path(version).name)
        temporary.replace(self._best)

    def hugging_face(self, version: Version) -> Path:
        """Where the version's Hugging Face form is."""
        return self._path(version) / HUGGING_FACE

    def _path(self, version: Version) -> Path:
        return self._directory / f"step-{version.number:06d}"

    def _whole(self) -> list[Path]:
        return sorted(p.parent for p in self._directory.glob(f"step-*/{_VERSION}"))

    def _forget(self) -> None:
        best = self._best.resolve() if self._best.is_symlink() else None
        for path in self._whole()[: -self._keep]:
            if path != best:
                shutil.rmtree(path, ignore_errors=True)
