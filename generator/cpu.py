"""What the stock SGLang needs to leave nothing behind when it is killed, and to run where there is no GPU.

SGLang loads both functions in each of its processes, through its own plugin entry points (pyproject.toml). But for the
first two rows they do nothing unless SGLANG_USE_CPU_ENGINE=1, which `generator.engine` sets where there is no CUDA.

    register   its processes share their load in the generator's memory-backed directory, which goes with the generator,
               and progress bars need no file
    activate   importable at all: a stand-in for the sgl_kernel package, torchvision's operator schemas
    register   correct: per-request seeds, which SGLang honours only with kernels that exist on GPUs, and no CUDA call
               in the routed-experts path
"""

import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.vision import declare_vision_operators
from generator.arguments import MEMORY

_SAMPLER = "sglang.srt.layers.sampler"
_DEFAULT_SEED = 42
_PRIME_1, _PRIME_2, _PRIME_3 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
_MASK = 0xFFFFFFFF


def activate() -> None:
    """The platform plugin: makes SGLang importable, and leaves its own CPU platform in charge by returning None."""
    if _on_cpu():
        _stand_in_for_sgl_kernel()
        declare_vision_operators()


def register() -> None:
    """The general plugin: hooks in SGLang's own registry."""
    _keep_progress_bars_to_themselves()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if directory := os.environ.get(MEMORY):
        loads = "sglang.srt.managers.load_snapshot.shm_path_for"
        HookRegistry.register(loads, lambda name: f"{directory}/loads-{Path(name).name}", HookType.REPLACE)
    if not _on_cpu():
        return
    batch_info = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch"
    HookRegistry.register(batch_info, _seed_rows, HookType.AFTER)
    HookRegistry.register(f"{_SAMPLER}.multinomial_with_seed", multinomial_with_seed, HookType.REPLACE)
    filtered = f"{_SAMPLER}.top_k_top_p_min_p_sampling_from_probs_torch"
    HookRegistry.register(filtered, sample_filtered, HookType.REPLACE)
    pin = "sglang.srt.mem_cache.pool_host.common._cuda_host_register"
    HookRegistry.register(pin, lambda *_, **__: None, HookType.REPLACE)


def multinomial_with_seed(logprobs: Any, seed: Any, positions: Any) -> Any:
    """One sample a row that depends on the row's distribution, seed and position alone, whatever else is in the batch.

    SGLang's own hashes with a Triton kernel. This draws one uniform number a row and inverts the distribution.

    Args:
        logprobs: Float[rows, vocabulary], not necessarily normalised.
        seed: Int64[rows].
        positions: Int64[rows], of the token in its sequence.

    Returns:
        Int64[rows, 1].
    """
    import torch

    uniform = _hash(seed, positions[: len(seed)]).to(torch.float64).add_(0.5).div_(_MASK + 1)
    cumulative = logprobs.to(torch.float64).exp_().cumsum_(dim=-1)
    target = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=logprobs.shape[-1] - 1)


def sample_filtered(
    probs: Any, top_ks: Any, top_ps: Any, _min_ps: Any, need_min_p: bool, seed: Any, positions: Any, **_: Any
) -> Any:
    """One sample a row after top-k and top-p, drawn in the order of token ids.

    SGLang's own draws in the order of probability, and takes this way for the whole batch where one request (a greedy
    one, say) asks for it: the others' samples would change with their company.

    Args:
        probs: Float[rows, vocabulary].
        top_ks: Int[rows].
        top_ps: Float[rows].
        need_min_p: Whether a row has a min-p, which is not supported.
        seed: Int64[rows].
        positions: Int64[rows].

    Returns:
        Int32[rows].
    """
    import torch

    assert not need_min_p, "min-p is no sampling key of Sluice"
    rows = ((top_ks < probs.shape[-1]) | (top_ps < 1)).nonzero().flatten()
    ordered, token_ids = probs[rows].sort(dim=-1, descending=True, stable=True)
    dropped = torch.arange(probs.shape[-1]) >= top_ks[rows, None]
    dropped |= ordered.cumsum(dim=-1) - ordered > top_ps[rows, None]
    kept = probs.clone()
    kept[rows] = kept[rows].scatter(-1, token_ids, ordered.masked_fill(dropped, 0.0))
    return multinomial_with_seed(kept.log(), seed, positions).flatten().to(torch.int32)


def _hash(seed: Any, position: Any) -> Any:
    """32 well-mixed bits of each (seed, position), as int64; the mixing is that of MurmurHash3's finaliser."""
    value = (seed & _MASK) * _PRIME_1 & _MASK
    for word in (seed >> 32 & _MASK, position.to(seed.dtype) & _MASK):
        value = _mix(value ^ (word + _PRIME_1 & _MASK))
    return value


def _mix(value: Any) -> Any:
    value = (value ^ (value >> 16)) * _PRIME_2 & _MASK
    value = (value ^ (value >> 13)) * _PRIME_3 & _MASK
    return value ^ (value >> 16)


def _seed_rows(result: Any, _cls: type, batch: Any, *_: Any, **__: Any) -> Any:
    """Gives each row its request's seed, as deterministic inference would."""
    import torch

    if result.sampling_seed is None:
        seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        result.sampling_seed = torch.tensor([_DEFAULT_SEED if s is None else s for s in seeds], dtype=torch.int64)
    return result


def _keep_progress_bars_to_themselves() -> None:
    """Gives tqdm a lock of threads: its own is a named semaphore, which stays in /dev/shm when a process is killed."""
    import threading

    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())


def _on_cpu() -> bool:
    return os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"


def _stand_in_for_sgl_kernel() -> None:
    """A module whose operators can be imported and fail when called: none is, on this path."""
    if importlib.util.find_spec("sgl_kernel") is not None:
        return
    module = types.ModuleType("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    module.__getattr__ = _missing_operator  # type: ignore[method-assign]
    sys.modules["sgl_kernel"] = module


def _missing_operator(name: str) -> Callable[..., Any]:
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def unavailable(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} needs the CPU build of sgl-kernel")

    return unavailable
