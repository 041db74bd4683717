"""Which kernels the model is made of: a function of what is installed.

Linear layers and the experts' matrix products are the same everywhere, and so are the names of parameters: a checkpoint
does not know which kernels wrote it.
"""

import os
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from common.errors import ConfigError
from learner.megatron.attention import PackedAttention, RMSNorm
from learner.megatron.offload import standard_adam
from learner.megatron.substitutes import has_engine

_DETERMINISM = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
_PROVIDERS = {"transformer_engine": "TransformerEngine", "apex": "Apex"}


class Installed(NamedTuple):
    """What there is to choose from.

    Attributes:
        cuda: Whether torch has a GPU.
        transformer_engine: Whether it is, 2.1 or newer.
        apex_gradients: Whether Apex's `fused_weight_gradient_mlp_cuda` is.
        triton: Whether torch can compile for the GPU.
        adam: The package of the AdamW that Megatron found for itself; any other than these two is torch's.
        router_product: Whether Megatron found TransformerEngine's product for the router.
    """

    cuda: bool
    transformer_engine: bool
    apex_gradients: bool
    triton: bool
    adam: str
    router_product: bool


class Kernels(NamedTuple):
    """Who provides each; TransformerEngine's are Megatron-core's wrappers of them."""

    core_attention: str
    norm: str
    rotary: str
    permutation: str
    swiglu: str
    gradient_sums: str
    router: str
    adam: str
    experts: str = "torch grouped_mm"


def installed() -> Installed:
    """What this process finds."""
    apex = find_spec("fused_weight_gradient_mlp_cuda") is not None
    product: Any = getattr(moe_utils, "te_general_gemm", None)
    return Installed(
        cuda=torch.cuda.is_available(),
        transformer_engine=has_engine(),
        apex_gradients=apex,
        triton=find_spec("triton") is not None,
        adam=standard_adam().__module__.partition(".")[0],
        router_product=product is not None,
    )


def choose(there: Installed, dtype: torch.dtype, *, adam_on_host: bool) -> Kernels:
    """TransformerEngine's where it is installed and there is a GPU, else torch's own.

    The router's product and AdamW are those that Megatron takes by itself. TransformerEngine has no fast attention in
    float32, so torch's is taken there.
    """
    engine = there.cuda and there.transformer_engine
    ours, theirs = "torch", "TransformerEngine"
    return Kernels(
        core_attention=theirs if engine and dtype is torch.bfloat16 else "torch SDPA",
        norm=theirs if engine else ours,
        rotary=theirs if engine else ours,
        permutation=theirs if engine else ours,
        swiglu="torch compiled" if there.cuda and there.triton else ours,
        gradient_sums="Apex" if there.cuda and there.apex_gradients else ours,
        router=theirs if there.router_product else ours,
        adam=ours if adam_on_host else _PROVIDERS.get(there.adam, ours),
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
    """The module of core attention, over packed sequences.

    Raises:
        ConfigError: The environment asks TransformerEngine for passes that differ from one another.
    """
    if kernels.core_attention == "torch SDPA":
        return PackedAttention
    # Megatron demands it of its deterministic mode; TransformerEngine reads it when a layer is made.
    if (found := os.environ.setdefault(_DETERMINISM, "0")) != "0":
        raise ConfigError(f"environment: found {_DETERMINISM}={found}, expected 0, or that it is not set")
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def norm(kernels: Kernels) -> Any:
    """The class of the norms."""
    return RMSNorm if kernels.norm == "torch" else _transformer_engine_norm()


def _transformer_engine_norm() -> Any:
    import transformer_engine.pytorch as engine  # pyright: ignore[reportMissingImports]

    base: Any = engine.RMSNorm

    class EngineNorm(base):
        """Its norm, with the arguments that Megatron gives."""

        def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
            super().__init__(
                hidden_size, eps=eps, sequence_parallel=config.sequence_parallel, dtype=config.params_dtype
            )

    return EngineNorm
