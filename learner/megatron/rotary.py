"""Rotary position embedding of packed sequences in plain torch, in the place of TransformerEngine's fused kernel.

Megatron's own unfused one takes the sequences apart in each layer. Here the angles of a micro-batch's tokens are found
once, and what the backward pass keeps is theirs alone.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from learner.megatron.tokens import piece

_tables = WeakTensorKeyDictionary()  # cosines and (-sin, sin) of a micro-batch, as long as its description lives


def rotate_packed(
    t: Float[Tensor, "tokens heads channels"],
    cu_seqlens: Int[Tensor, " sequences_and_end"],
    freqs: Float[Tensor, "positions 1 1 channels"],
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Float[Tensor, "tokens heads channels"]:
    """Queries or keys, each pair of channels turned by its angle; the names are those of TransformerEngine's.

    Args:
        t: Of this context rank's tokens.
        cu_seqlens: Where each sequence begins, and the end; those of all context ranks. Not to be changed in place.
        freqs: Angle of each channel at each position; both halves of the channels have the same.
        cp_size: Ranks that share the sequences.
        cp_rank: This one's number.
    """
    table = _tables.get(cu_seqlens)
    if table is None:
        starts = cu_seqlens.cpu().numpy().astype(np.int64)
        index = piece(starts, cp_rank, cp_size)
        position = index - starts[np.searchsorted(starts, index, side="right") - 1]
        angles = freqs[torch.from_numpy(position).to(freqs.device), 0]
        sines = angles.sin()
        sines[..., : sines.shape[-1] // 2].neg_()
        table = _tables[cu_seqlens] = (angles.cos().to(t.dtype), sines.to(t.dtype))
    return _Rotation.apply(t, *table)  # type: ignore[no-any-return]


class _Rotation(torch.autograd.Function):
    """Its backward pass turns the other way."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(t, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1).mul_(sin).addcmul_(t, cos)
