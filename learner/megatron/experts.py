"""The experts of a layer as two stacked weights: one grouped matrix product for all of them, on a CPU and on a GPU.

Megatron's own modules take them one after the other (SequentialMLP), or want TransformerEngine or another library.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from learner.megatron.parallel import Share


class GroupedExperts(MegatronModule):
    """This rank's experts, or its part of each, for Megatron's MoELayer.

    Attributes:
        gate_up: Gate and up projections, Parameter[experts, 2, width, hidden].
        down: Down projections, Parameter[experts, hidden, width].

    What this does not do: biases, other activations than SwiGLU, quantized weights.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: Any) -> None:
        """The weights are marked as shared or not; their values are not set."""
        super().__init__(config=config)
        assert config.moe_ffn_hidden_size is not None
        assert not config.moe_apply_probs_on_input
        parts = Share.of(pg_collection.expt_tp)
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size // parts.size
        self.gate_up = self._weight(num_local_experts, 2, width, hidden, dim=2)
        self.down = self._weight(num_local_experts, hidden, width, dim=2)

    def forward(
        self,
        hidden: Float[Tensor, "rows hidden"],
        tokens_per_expert: Int[Tensor, " experts"],
        probs: Float[Tensor, " rows"],
    ) -> tuple[Float[Tensor, "rows hidden"], None]:
        """The experts' outputs, each times its probability; with expert tensor parallelism this rank's part of the sum.

        Args:
            hidden: A row for each token and each of its experts, in the order of the experts.
            tokens_per_expert: How many rows each has; some may have none, and all of them.
            probs: Of each row.
        """
        ends = tokens_per_expert.to(hidden.device).cumsum(0, dtype=torch.int32)
        gate_up = F.grouped_mm(hidden, self.gate_up.flatten(1, 2).transpose(1, 2), offs=ends)
        if self.config.bias_activation_fusion:
            activated = weighted_bias_swiglu_impl(gate_up, None, probs[:, None])
        else:
            activated = _WeightedSwiglu.apply(gate_up, probs)
        return F.grouped_mm(activated, self.down.transpose(1, 2), offs=ends), None

    def backward_dw(self) -> None:
        """Nothing: the backward pass has all gradients."""

    def _weight(self, *shape: int, dim: int) -> torch.nn.Parameter:
        device = "cpu" if self.config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
        weight = torch.nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
        setattr(weight, "allreduce", self.config.expert_model_parallel_size == 1)  # noqa: B010
        return weight


class _WeightedSwiglu(torch.autograd.Function):
    """silu(gate) · up · probability, of which the backward pass keeps the inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, probs: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, probs)
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate).mul_(up) * probs[:, None]).to(gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate_up, probs = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = gate.float().sigmoid()
        activated = gate * sigmoid
        grad_probs = (activated * up).mul_(grad).sum(-1, dtype=probs.dtype)
        weighted = grad * probs[:, None]
        found = torch.empty_like(gate_up)
        grad_gate, grad_up = found.chunk(2, dim=-1)
        torch.mul(weighted, activated, out=grad_up)
        slope = sigmoid.addcmul_(activated, 1 - sigmoid)
        torch.mul(weighted.mul_(up), slope, out=grad_gate)
        return found, grad_probs
