"""Attention over packed sequences, and the norm, in plain torch: what Megatron's local layers lack.

Sequences are packed head to tail (thd). Neighbours of equal length form a run, and a run is one batched call of
torch's scaled dot product attention on views of the packed tensors: `learner.batch.pack` puts equal lengths side by
side, so that hundreds of short sequences cost a handful of calls.

With context parallelism a rank has two pieces of each sequence (`learner.megatron.tokens`); keys and values of the
others are gathered, and each piece attends to all that is before its end.
"""

import math
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from learner.megatron.parallel import Share


class Run(NamedTuple):
    """Neighbouring sequences of one length."""

    num_sequences: int
    length: int


@dataclass
class PackedRuns(PackedSeqParams):
    """Megatron's description of a packed batch, with its runs.

    Attributes:
        runs: They cover the tokens, in order.
    """

    runs: tuple[Run, ...] = ()


def packed_runs(sequence_starts: Tensor, device: torch.device, num_context_ranks: int = 1) -> PackedRuns:
    """Describes a packed batch; `sequence_starts` is Int[S+1], int32, on the CPU.

    TransformerEngine demands the padded starts where ranks share sequences, and compares them with the others where it
    is given any: there is no padding between sequences, so they are the same.
    """
    lengths = [end - start for start, end in pairwise(sequence_starts.tolist())]
    runs = tuple(Run(len(list(same)), length) for length, same in groupby(lengths))
    starts = sequence_starts.to(device)
    return PackedRuns(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        runs=runs,
        **(dict.fromkeys(("cu_seqlens_q_padded", "cu_seqlens_kv_padded"), starts) if num_context_ranks > 1 else {}),
    )


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence; Megatron's core attention without TransformerEngine.

    What this does not do: dropout, unpacked batches.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        del layer_number, attn_mask_type, attention_type
        assert config.attention_dropout == 0.0
        assert config.kv_channels is not None
        self._scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self._context = Share.of(parallel_state.get_context_parallel_group())

    def forward(
        self,
        query: Float[Tensor, "tokens heads channels"],
        key: Float[Tensor, "tokens groups channels"],
        value: Float[Tensor, "tokens groups channels"],
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: PackedRuns | None = None,
    ) -> Float[Tensor, "tokens width"]:
        """The attended values, heads side by side."""
        del attention_mask, attn_mask_type, attention_bias
        assert packed_seq_params is not None
        runs = packed_seq_params.runs
        sizes = [run.num_sequences * run.length // self._context.size for run in runs]
        if self._context.size == 1:
            parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), runs, strict=True)
            return torch.cat([self._attend(*part) for part in parts]).flatten(1)
        keys, values = (self._of_all_ranks(t).split(sizes, dim=1) for t in (key, value))
        pieces = zip(query.split(sizes), keys, values, runs, strict=True)
        return torch.cat([self._attend_pieces(*part) for part in pieces]).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, run: Run) -> Tensor:
        q, k, v = (t.unflatten(0, run).transpose(1, 2) for t in (query, key, value))
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale, enable_gqa=True)
        return output.transpose(1, 2).flatten(0, 1)

    def _attend_pieces(self, query: Tensor, key: Tensor, value: Tensor, run: Run) -> Tensor:
        """This rank's two pieces of each sequence; keys and values are those of all context ranks."""
        ranks, rank = self._context.size, self._context.rank
        piece = run.length // (2 * ranks)
        k, v = (_in_order(t.unflatten(1, (run.num_sequences, 2, piece))) for t in (key, value))
        outputs: list[Tensor] = []
        for i, number in enumerate((rank, 2 * ranks - 1 - rank)):
            q = query.unflatten(0, (run.num_sequences, 2, piece))[:, i].transpose(1, 2)
            seen = (number + 1) * piece
            mask: Any = causal_lower_right(piece, seen)  # a boolean one would rule the flash kernel out
            options: dict[str, Any] = {"attn_mask": mask, "scale": self._scale, "enable_gqa": True}
            outputs.append(F.scaled_dot_product_attention(q, k[:, :, :seen], v[:, :, :seen], **options).transpose(1, 2))
        return torch.stack(outputs, dim=1).flatten(0, 2)

    def _of_all_ranks(self, own: Tensor) -> Tensor:
        """Float[ranks, t, groups, channels]; the gradient of what others used comes back."""
        return gather_from_sequence_parallel_region(own, group=self._context.group).unflatten(0, (-1, len(own)))


def _in_order(pieces: Float[Tensor, "ranks sequences 2 piece groups channels"]) -> Tensor:
    """The pieces as whole sequences, heads before tokens: Float[sequences, groups, tokens, channels]."""
    first, second = pieces.unbind(2)
    return torch.cat([first, second.flip(0)]).transpose(0, 1).flatten(1, 2).transpose(1, 2)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, taken in float32 as transformers takes it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self._eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """`x` with its last dimension scaled to mean square 1, times the weight."""
        return _ScaledToOne.apply(x, self.weight, self._eps)  # type: ignore[no-any-return]


class _ScaledToOne(torch.autograd.Function):
    """The norm, of which the backward pass keeps the input and one scale a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        scaled = x.float() * scale
        grad_weight = (grad * scaled).flatten(0, -2).sum(0).to(weight.dtype)
        wide = (grad * weight).float()
        along = (wide * scaled).mean(-1, keepdim=True)
        return wide.addcmul_(scaled, along, value=-1).mul_(scale).to(x.dtype), grad_weight, None
