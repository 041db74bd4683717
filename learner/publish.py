"""Weights on their way to the generators: a directory a version, on memory-backed storage."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from common import wire
from common.config import Config
from common.rendezvous import RunKeys
from common.versions import Version
from learner.export import write_hugging_face
from learner.ranks import Ranks

PROBE_TOKENS = 64


def weights_dir(config: Config, run_dir: Path) -> Path:
    """Where the run's versions are published."""
    return config.weights.of_run(RunKeys.load(run_dir).public)


class Publisher:
    """Writes versions and keeps the newest few.

    What this does not do: it sends nothing. Generators pull; one that is in the middle of loading a version that is
    removed here takes the newest instead.
    """

    def __init__(self, config: Config, run_dir: Path, vocab_size: int, ranks: Ranks) -> None:
        self._directory = weights_dir(config, run_dir)
        self._keep = config.weights.keep
        self._ranks = ranks
        self._model_dir = Path(config.model)
        generator = torch.Generator().manual_seed(config.seed)
        self._probe = torch.randint(0, vocab_size, (PROBE_TOKENS,), generator=generator).int()
        left = self._directory.glob("*.*") if self._directory.is_dir() else ()
        self._published = sorted((path for path in left if path.is_dir()), key=lambda path: path.stat().st_mtime)

    def publish(
        self,
        version: Version,
        tensors: Iterable[tuple[str, torch.Tensor]],
        logprobs: Callable[[torch.Tensor], torch.Tensor],
    ) -> wire.Manifest:
        """Writes one version whole, removes the oldest, and returns its manifest. All ranks write their weights.

        Args:
            version: Of the weights.
            tensors: The policy's weights, those of this rank.
            logprobs: The policy's logprobs of a token sequence, Int[T] -> Float[T], the first one without meaning.

        Raises:
            RunDirectoryError: The memory-backed storage is full.
        """
        path = self._directory / str(version)
        size_bytes = write_hugging_face(tensors, self._model_dir, path, self._ranks, whole_model=False)
        self._published.append(path)
        while self._ranks.is_first and len(self._published) > self._keep:
            shutil.rmtree(self._published.pop(0), ignore_errors=True)
        return wire.Manifest(
            version=version,
            path=str(path),
            size_bytes=size_bytes,
            probe_token_ids=wire.int_bytes(self._probe.numpy()),
            probe_logprobs=wire.float_bytes(logprobs(self._probe)[1:].float().cpu().numpy()),
        )

    def close(self) -> None:
        """Removes everything published: nobody pulls from a learner that has ended."""
        shutil.rmtree(self._directory, ignore_errors=True)
