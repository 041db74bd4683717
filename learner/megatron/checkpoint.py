"""The whole of a training state: what a checkpoint holds, whatever the division over ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from common.shape import ModelShape
from learner.megatron.model import HiddenStateModel
from learner.megatron.optimizer import Optimizer
from learner.megatron.parallel import Place
from learner.megatron.shards import optimizer_shards
from learner.sharded import State, read, sizes

_PROGRESS = "progress"


def snapshot(pieces: Sequence[HiddenStateModel], optimizer: Optimizer, shape: ModelShape, place: Place) -> State:
    """This rank's part of the state, in host memory: what is trained afterwards does not change it.

    The weights are the optimizer's, in float32; the model's are those, rounded.
    """
    progress = {_PROGRESS: torch.tensor(optimizer.num_updates)} if dist.get_rank() == 0 else {}
    random = {name: state.clone() for name, state in _random_states().items()}
    return {**optimizer_shards(pieces, optimizer, shape, place, copy=True), **random, **progress}


def load(path: Path, pieces: Sequence[HiddenStateModel], optimizer: Optimizer, shape: ModelShape, place: Place) -> None:
    """Sets model, optimizer, schedule and random states to what a directory holds.

    A rank that the checkpoint does not know keeps its random states.

    Raises:
        RunDirectoryError: It is missing, broken, or of another model.
    """
    progress = torch.zeros(2, dtype=torch.int64)
    found, random = sizes(path), _random_states()
    known = {name: state for name, state in random.items() if found.get(name) == state.size()}
    state = {**optimizer_shards(pieces, optimizer, shape, place, copy=False), **known, _PROGRESS: progress}
    read(path, state, dist.group.WORLD if dist.get_world_size() > 1 else None)
    num_counted, num_made = progress.tolist()
    optimizer.go_on_after(num_counted, num_made)
    _set_random_states(random)


def _random_states() -> dict[str, torch.Tensor]:
    """Of this rank, by their names in a checkpoint."""
    states: dict[str, torch.Tensor] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {f"megatron.{name}": state for name, state in _tracker().get_states().items()}
    return {f"random.{dist.get_rank()}.{name}": state.cpu() for name, state in states.items()}


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    own = {name.split(".", 2)[2]: state for name, state in states.items()}
    torch.set_rng_state(own.pop("torch"))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(own.pop("cuda"))
    _tracker().set_states({name.removeprefix("megatron."): state for name, state in own.items()})


def _tracker() -> Any:
    return get_cuda_rng_tracker()
