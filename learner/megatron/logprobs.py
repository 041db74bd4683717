"""Logprobs of tokens and entropies of distributions, from hidden states and the output layer's weight.

Logits, length times vocabulary, never exist for more than a chunk of rows.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 24
MIN_CHUNK_ROWS = 64  # below, matrix products are slow and round differently from larger ones


def linear_logprobs(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " rows"],
    temperature: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Logprob of each row's target and entropy of its distribution; float32. The logprobs have a gradient.

    The values are those of the whole logits `hidden @ weight.T`, but for the last bits, where a matrix product of fewer
    rows may round differently. Peak memory beside inputs and gradients is a few chunks of at least 64 rows of logits,
    however many rows there are.

    Args:
        hidden: Final hidden states. With `group`, the same on each of its ranks.
        weight: Of the output layer. With `group`, this rank's rows of it, as many on each rank.
        targets: Ids in the whole vocabulary.
        temperature: Divides the logits.
        group: The ranks that share the vocabulary. The results are the same on each; the gradient of `hidden` is this
            rank's share, to be summed over the group by whatever copied `hidden` to its ranks, as behind Megatron's
            ColumnParallelLinear.
    """
    return _LinearLogprobs.apply(hidden, weight, targets, temperature, group)  # type: ignore[misc]


class _LinearLogprobs(torch.autograd.Function):
    """The backward pass makes each chunk of logits anew; the weight's gradient is summed in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        shard = _Shard(weight, group)
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        log_sums = torch.empty_like(logprobs)
        for rows in even_chunks(len(targets), len(weight)):
            logits = (hidden[rows] @ weight.t()).float() / temperature
            logprobs[rows], entropy[rows], log_sums[rows] = shard.chunk(logits, targets[rows])
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.temperature, ctx.shard = temperature, shard
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, log_sums = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in even_chunks(len(targets), len(weight)):
            scale = (grad[rows] / ctx.temperature)[:, None]
            logits = (hidden[rows] @ weight.t()).float().div_(ctx.temperature)
            grad_logits = logits.sub_(log_sums[rows, None]).exp_().mul_(-scale)
            columns, mine = ctx.shard.columns(targets[rows])
            grad_logits.scatter_add_(1, columns[:, None], scale * mine[:, None])
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


class _Shard:
    """This rank's part of the vocabulary, and the sums over all parts."""

    def __init__(self, weight: Tensor, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._size = len(weight)
        self._first = 0 if group is None else dist.get_rank(group) * len(weight)

    def columns(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target in this part, 0 where it is in another, and whether it is in this one."""
        columns = targets - self._first
        mine = (columns >= 0) & (columns < self._size)
        return columns.where(mine, 0), mine

    def chunk(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logprobs of the targets, entropies and log of the sum of exponentials, each Float[rows]; uses `logits` up."""
        if self._group is None:
            chosen = logits.gather(1, targets[:, None])[:, 0]
            logits = torch.log_softmax(logits, dim=-1)
            logprobs = logits.gather(1, targets[:, None])[:, 0]
            return logprobs, torch.special.entr(logits.exp_()).sum(-1), chosen - logprobs
        highest = self._reduced(logits.amax(-1), dist.ReduceOp.MAX)
        logits.sub_(highest[:, None])
        columns, mine = self.columns(targets)
        chosen = logits.gather(1, columns[:, None])[:, 0].where(mine, 0.0)
        exponentials = logits.exp()
        sums = torch.stack([chosen, exponentials.sum(-1), exponentials.mul_(logits).sum(-1)])
        chosen, total, weighted = self._reduced(sums, dist.ReduceOp.SUM)
        log_total = total.log()
        return chosen - log_total, log_total - weighted / total, highest + log_total

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        dist.all_reduce(values, operation, group=self._group)
        return values


def even_chunks(num_rows: int, vocab: int) -> list[slice]:
    """Slices of rows of nearly one size: about CHUNK_ELEMENTS logits each, and at least MIN_CHUNK_ROWS rows."""
    size = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocab)
    num = max(1, num_rows // size)
    edges = [num_rows * i // num for i in range(num + 1)]
    return [slice(start, end) for start, end in pairwise(edges)]
