"""Megatron's process groups. One rank for now: every parallel size is 1."""

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from common.errors import ConfigError


def initialize(seed: int) -> None:
    """Joins the process group that torchrun describes, or one of a single rank, and seeds every generator.

    The groups are global to the process and are made once; the seeds are set each time.

    Raises:
        ConfigError: torchrun started more than one rank.
    """
    if not dist.is_initialized():
        _join()
    if dist.get_world_size() != 1:
        raise ConfigError(f"torchrun --nproc-per-node: found {dist.get_world_size()} ranks, expected 1")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def compute_device() -> torch.device:
    """Where this rank's tensors are."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _join() -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl"
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
    else:  # an in-process store: one rank needs neither port nor file
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
