"""Megatron's process groups, and where this rank stands in them."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from common.errors import ConfigError
from common.learning import ParallelConfig
from learner.ranks import COLLECTIVE_TIMEOUT


@dataclass(frozen=True)
class Share:
    """Which part of something is this rank's.

    Attributes:
        rank: The part's number.
        size: Parts in all.
        group: The ranks that have the others.
    """

    rank: int
    size: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, group: Any) -> "Share":
        """This rank's part of what a process group shares."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group)


@dataclass(frozen=True)
class Place:
    """This rank's part of each dimension that the ranks are laid out in.

    Attributes:
        data: Of the sequences.
        tensor: Of each matrix.
        context: Of each sequence.
        pipeline: Of the layers.
        expert: Of the experts.
        expert_tensor: Of each expert's matrices.
        replicas: Copies of what is no expert: data and context.
        expert_replicas: Copies of each expert.
        sequence: Whether the tensor ranks share the tokens of norms and residuals.
        virtual_pipeline: Pieces of layers that each stage has.
    """

    data: Share
    tensor: Share
    context: Share
    pipeline: Share
    expert: Share
    expert_tensor: Share
    replicas: Share
    expert_replicas: Share
    sequence: bool
    virtual_pipeline: int

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the last layer, and so the logprobs."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def speaks(self) -> bool:
        """Whether this rank's logprobs are those that count, of all that have the same."""
        return self.is_last_stage and self.tensor.rank == 0 and self.context.rank == 0


def initialize(parallel: ParallelConfig, seed: int) -> Place:
    """Joins the process group that torchrun describes, or one of a single rank, and seeds every generator.

    The groups are global to the process: a policy of the same division has those of the one before, and one of another
    division ends them.

    Raises:
        ConfigError: torchrun started another number of ranks.
    """
    if not dist.is_initialized():
        _join()
    if dist.get_world_size() != parallel.num_ranks:
        raise ConfigError(
            f"torchrun --nproc-per-node: found {dist.get_world_size()} ranks, expected {parallel.num_ranks}: the "
            "product of learner.parallel.data, tensor, pipeline and context"
        )
    if _division() != _sizes(parallel):
        _divide(parallel)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return _place(parallel)


def compute_device() -> torch.device:
    """Where this rank's tensors are."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _sizes(parallel: ParallelConfig) -> tuple[int, ...]:
    """What tells one division of the same ranks from another."""
    experts = (parallel.expert, parallel.expert_tensor)
    return (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context, *experts)


def _division() -> tuple[int | None, ...]:
    """The sizes that the groups of this process have now; none where there are no groups."""
    if not parallel_state.model_parallel_is_initialized():
        return ()
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )


def _divide(parallel: ParallelConfig) -> None:
    """Makes the groups in the place of those that are there: each of gloo's has a thread that wakes every 10 ms."""
    for group in parallel_state._global_process_group_list or ():  # pyright: ignore[reportPrivateUsage]
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() / 60),
    )


def _place(parallel: ParallelConfig) -> Place:
    return Place(
        data=Share.of(parallel_state.get_data_parallel_group()),
        tensor=Share.of(parallel_state.get_tensor_model_parallel_group()),
        context=Share.of(parallel_state.get_context_parallel_group()),
        pipeline=Share.of(parallel_state.get_pipeline_model_parallel_group()),
        expert=Share.of(parallel_state.get_expert_model_parallel_group()),
        expert_tensor=Share.of(parallel_state.get_expert_tensor_parallel_group()),
        replicas=Share.of(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        expert_replicas=Share.of(parallel_state.get_expert_data_parallel_group()),
        sequence=parallel.sequence,
        virtual_pipeline=parallel.virtual_pipeline,
    )


def _join() -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:  # an in-process store: one rank needs neither port nor file
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
