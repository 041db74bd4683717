"""Logprobs of tokens and entropies of distributions, from logits, a chunk of rows at a time."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 24


def token_logprobs(
    logits: Float[Tensor, "tokens vocab"],
    token_ids: Int[Tensor, " tokens"],
    starts: Int[Tensor, " sequences"],
    temperature: float,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Logprob of each token given those before it, and entropy of the distribution that it was drawn from; float32.

    Both are 0 for the first token of each sequence. The logprobs have a gradient, the entropies have none.

    Args:
        logits: Row t is the prediction for token t + 1.
        token_ids: The packed tokens.
        starts: Where the sequences begin; the first entry is 0.
        temperature: Divides the logits.
    """
    logprobs, entropy = _Logprobs.apply(logits, token_ids, temperature)  # type: ignore[misc]
    inside = torch.ones(len(token_ids), dtype=torch.bool, device=logits.device)
    inside[starts] = False
    return logprobs.where(inside, 0.0), entropy.where(inside, 0.0)


class _Logprobs(torch.autograd.Function):
    """Float32 exists for one chunk at a time; the backward pass makes the probabilities anew."""

    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "tokens vocab"], token_ids: Int[Tensor, " tokens"], temperature: float
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        ctx.save_for_backward(logits, token_ids)
        ctx.temperature = temperature
        logprobs = torch.zeros(len(token_ids), dtype=torch.float32, device=logits.device)
        entropy = torch.zeros_like(logprobs)
        for rows, tokens in _chunks(logits):
            chunk = torch.log_softmax(logits[rows].float() / temperature, dim=-1)
            logprobs[tokens] = chunk.gather(1, token_ids[tokens, None])[:, 0]
            entropy[tokens] = torch.special.entr(chunk.exp_()).sum(-1)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " tokens"], _: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, token_ids = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        for rows, tokens in _chunks(logits):
            scale = (grad[tokens] / ctx.temperature)[:, None]
            chunk = torch.softmax(logits[rows].float() / ctx.temperature, dim=-1).mul_(-scale)
            grad_logits[rows] = chunk.scatter_add_(1, token_ids[tokens, None], scale)
        return grad_logits, None, None


def _chunks(logits: Tensor) -> list[tuple[slice, slice]]:
    """Slices of rows, and of the tokens that they predict."""
    size = max(1, CHUNK_ELEMENTS // logits.shape[1])
    last = len(logits) - 1
    return [(slice(at, min(at + size, last)), slice(at + 1, min(at + size, last) + 1)) for at in range(0, last, size)]
