"""What Megatron-core takes from TransformerEngine, for where that is not installed: on a CPU always."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import distrib_optimizer
from megatron.core.transformer.moe import moe_utils

from learner.megatron.rotary import rotate_packed

_OLDEST_ENGINE = (2, 1)


def has_engine() -> bool:
    """Whether TransformerEngine is installed, and not too old."""
    try:
        major, minor, *_ = version("transformer_engine").split(".")
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= _OLDEST_ENGINE


def substitute_transformer_engine() -> None:
    """Puts the substitutes in place; where TransformerEngine is installed, or Apex for AdamW, nothing changes."""
    namespaces: list[Any] = [optimizer, distrib_optimizer, moe_utils, rope_utils]
    adam, distributed_adam, experts, rotary = namespaces
    if adam.USING_PYTORCH_OPTIMIZER:
        adam.Adam, adam.USING_PYTORCH_OPTIMIZER = FusedAdam, False
    if not distributed_adam.HAVE_APEX_OR_TE:
        distributed_adam.Adam = FusedAdam
        distributed_adam.HAVE_APEX_OR_TE = distributed_adam.USING_TE_OPTIMIZER = True
    if not hasattr(experts, "te_general_gemm"):  # a name that 0.16.1 reads without TransformerEngine, too
        experts.te_general_gemm = None
    if rotary.fused_apply_rotary_pos_emb_thd is None or not (has_engine() and torch.cuda.is_available()):
        rotary.fused_apply_rotary_pos_emb_thd = rotate_packed


class FusedAdam(torch.optim.Optimizer):
    """AdamW in the form of TransformerEngine's: the step counter is the group's, the state two float32 moments.

    Megatron-core's distributed optimizer keeps its state in this form.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all groups."""
        assert closure is None
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = int(group.get("step") or 0) + 1
            self._step_group(group, [p for p in group["params"] if p.grad is not None])

    def _step_group(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        correction1 = 1 - beta1 ** group["step"]
        correction2 = 1 - beta2 ** group["step"]
        for param in params:
            state = self.state[param]
            if not state:
                state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
            assert param.grad is not None
            state["exp_avg"].lerp_(param.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
            root = (state["exp_avg_sq"] / correction2).sqrt_().add_(group["eps"])
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.addcdiv_(state["exp_avg"], root, value=-group["lr"] / correction1)
