"""Which kernels the model is made of: a function of what is installed.

Linear layers and the experts' matrix products are the same everywhere, and so are the names of parameters: a checkpoint
does not know which kernels wrote it.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from learner.megatron.attention import PackedAttention, RMSNorm

_PERMUTATION_SINCE = (2, 1)  # of TransformerEngine


class Installed(NamedTuple):
    """What there is to choose from.

    Attributes:
        cuda: Whether torch has a GPU.
        transformer_engine: Its version's first two numbers; None where it is not installed.
        apex_gradients: Whether Apex's `fused_weight_gradient_mlp_cuda` is.
        triton: Whether torch can compile for the GPU.
    """

    cuda: bool
    transformer_engine: tuple[int, int] | None
    apex_gradients: bool
    triton: bool


class Kernels(NamedTuple):
    """Who provides each; TransformerEngine's are Megatron-core's wrappers of them."""

    core_attention: str
    norm: str
    rotary: str
    permutation: str
    swiglu: str
    gradient_sums: str
    experts: str = "torch grouped_mm"


def installed() -> Installed:
    """What this process finds."""
    try:
        major, minor, *_ = version("transformer_engine").split(".")
        engine = (int(major), int(minor))
    except PackageNotFoundError:
        engine = None
    apex = find_spec("fused_weight_gradient_mlp_cuda") is not None
    return Installed(torch.cuda.is_available(), engine, apex, find_spec("triton") is not None)


def choose(there: Installed, dtype: torch.dtype) -> Kernels:
    """TransformerEngine's where it is installed and there is a GPU, else torch's own.

    TransformerEngine has no fast attention in float32, so torch's is taken there.
    """
    engine = there.transformer_engine if there.cuda else None
    ours, theirs = "torch", "TransformerEngine"
    return Kernels(
        core_attention=theirs if engine and dtype is torch.bfloat16 else "torch SDPA",
        norm=theirs if engine else ours,
        rotary=theirs if engine else ours,
        permutation=theirs if engine and engine >= _PERMUTATION_SINCE else ours,
        swiglu="torch compiled" if there.cuda and there.triton else ours,
        gradient_sums="Apex" if there.cuda and there.apex_gradients else ours,
    )


def options(kernels: Kernels) -> dict[str, Any]:
    """Megatron's options for a choice. Rotary embedding is always the fused one, for which there is a substitute."""
    return {
        "apply_rope_fusion": True,
        "bias_activation_fusion": kernels.swiglu != "torch",
        "gradient_accumulation_fusion": kernels.gradient_sums != "torch",
        "moe_permute_fusion": kernels.permutation != "torch",
    }


def core_attention(kernels: Kernels) -> Any:
    """The module of core attention, over packed sequences."""
    if kernels.core_attention == "torch SDPA":
        return PackedAttention
    # Megatron demands it of its deterministic mode; TransformerEngine reads it when a layer is made.
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def norm(kernels: Kernels) -> Any:
    """The class of the norms."""
    return RMSNorm if kernels.norm == "torch" else _transformer_engine_norm()


def _transformer_engine_norm() -> Any:
    import transformer_engine.pytorch as engine  # pyright: ignore[reportMissingImports]

    base: Any = engine.RMSNorm

    class EngineNorm(base):
        """Its norm, without the state of quantized weights, which checkpoints from elsewhere do not have."""

        get_extra_state = torch.nn.Module.get_extra_state
        set_extra_state = torch.nn.Module.set_extra_state

        def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
            super().__init__(
                hidden_size, eps=eps, sequence_parallel=config.sequence_parallel, dtype=config.params_dtype
            )

    return EngineNorm
