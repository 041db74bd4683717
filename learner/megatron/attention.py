"""Attention over packed sequences, and the norm, in plain torch: what Megatron's local layers lack.

Sequences are packed head to tail (thd). Neighbours of equal length form a run, and a run is one batched call of
torch's scaled dot product attention on views of the packed tensors: `learner.batch.pack` puts equal lengths side by
side, so that hundreds of short sequences cost a handful of calls.
"""

import math
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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


def packed_runs(sequence_starts: Tensor, device: torch.device) -> PackedRuns:
    """Describes a packed batch; `sequence_starts` is Int[S+1], int32, on the CPU."""
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
    )


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence; Megatron's core attention without TransformerEngine.

    What this does not do: context parallelism, dropout, unpacked batches.
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
        assert config.context_parallel_size == 1
        assert config.kv_channels is not None
        self._scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

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
        sizes = [run.num_sequences * run.length for run in runs]
        parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), runs, strict=True)
        return torch.cat([self._attend(*part) for part in parts]).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, run: Run) -> Tensor:
        q, k, v = (t.unflatten(0, run).transpose(1, 2) for t in (query, key, value))
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale, enable_gqa=True)
        return output.transpose(1, 2).flatten(0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Nothing: it has no weights."""
        del prefix, sharded_offsets, metadata
        return {}


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, taken in float32 as transformers takes it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self._eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """`x` with its last dimension scaled to mean square 1, times the weight."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return self.weight * (wide * scale).to(x.dtype)
