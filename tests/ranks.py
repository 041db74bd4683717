"""Several ranks on this machine, for tests of what they do together."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

IMPORTED = ("pytest", "learner.megatron.policy", "tests.learner.megatron.conformance")


def run_ranks(
    num_ranks: int, directory: Path, work: Callable[..., None], *args: Any, start_method: str = "forkserver"
) -> None:
    """Calls `work(*args)` on each rank of a gloo group over loopback, and returns when all have.

    Ranks are forked from one process that has imported torch and Megatron and has no threads and no group yet, so that
    a fork is safe: a rank that imports them itself takes five seconds of a core. What the environment became since the
    first call they do not see.

    Args:
        num_ranks: Size of the group.
        directory: Gets the file by which the ranks find each other; another one for each call.
        work: A function of a module, called with `args`.
        start_method: `spawn` for ranks that import everything themselves, and see today's environment.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A rank failed; the others are ended.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    store = directory / f"store-{num_ranks}"
    processes.start_processes(_rank, (num_ranks, store, work, args), num_ranks, start_method=start_method)


def _rank(rank: int, num_ranks: int, store: Path, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    work(*args)
    dist.destroy_process_group()
