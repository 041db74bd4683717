"""The whole of a training state as one of Megatron's distributed checkpoints: it can be read by another layout."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,  # pyright: ignore[reportPrivateUsage]
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import FileSystemWriter, save as save_sharded
from torch.distributed.checkpoint.api import CheckpointException

from common.errors import RunDirectoryError
from learner.megatron.optimizer import Optimizer

_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save(path: Path, pieces: Sequence[MegatronModule], optimizer: Optimizer) -> None:
    """Writes a directory, which is made.

    Raises:
        RunDirectoryError: It cannot be written.
    """
    with _one_line(path, "written"):
        path.mkdir(parents=True, exist_ok=True)
        state = _state(pieces, optimizer, loading=False)
        dist_checkpointing.save(state, str(path), _InProcess("torch_dist", 1), content_metadata=dict(_FORMAT))


def load(path: Path, pieces: Sequence[MegatronModule], optimizer: Optimizer) -> None:
    """Sets model, optimizer, schedule and random states to what a directory holds.

    Raises:
        RunDirectoryError: It is missing, broken, or of another model.
    """
    with _one_line(path, "read"):
        state: Any = dist_checkpointing.load(_state(pieces, optimizer, loading=True), str(path))
    for i, piece in enumerate(pieces):
        piece.load_state_dict(state["model"][f"piece-{i}"])
    optimizer.megatron.load_state_dict(state["optimizer"])
    optimizer.schedule.num_steps = 0  # it adds what it loads
    optimizer.schedule.load_state_dict(state["schedule"])
    _set_random_states(state["random"])


class _InProcess(SaveShardedStrategy):
    """Megatron's format, written by this process: Megatron's own writer forks, which is no good beside ZeroMQ."""

    @property
    def can_handle_sharded_objects(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        writer = FileSystemWriter(checkpoint_dir)
        save_sharded(mcore_to_pyt_state_dict(renamed, False), storage_writer=writer, planner=planner)


def _state(pieces: Sequence[MegatronModule], optimizer: Optimizer, *, loading: bool) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**_FORMAT, "dp_cp_group": group}
    weights = {f"piece-{i}": piece.sharded_state_dict(metadata=metadata) for i, piece in enumerate(pieces)}
    rank, size = dist.get_rank(), dist.get_world_size()
    return {
        "model": weights,
        "optimizer": optimizer.megatron.sharded_state_dict(weights, is_loading=loading, metadata=metadata),
        "schedule": optimizer.schedule.state_dict(),
        "random": ShardedObject("random", _random_states(), (size,), (rank,)),
    }


def _random_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": _tracker().get_states(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    _tracker().set_states(states["megatron"])


def _tracker() -> Any:
    return get_cuda_rng_tracker()


@contextmanager
def _one_line(path: Path, verb: str) -> Generator[None]:
    try:
        yield
    except (OSError, CheckpointingException, CheckpointException) as error:
        failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
        cause = failures[0][0] if failures else error
        raise RunDirectoryError(f"{path}: cannot be {verb}: {cause}") from error
