"""Which of a micro-batch's tokens this rank works on, and the way back from what it found for them.

With context parallelism each sequence is cut into 2·C pieces, and rank r of C has pieces r and 2·C - 1 - r: causal
attention costs all ranks the same then. The lengths are padded for that, and the last one further, so that the ranks
that share tokens between matrices have as many each.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from numpy.typing import NDArray
from torch import Tensor

from learner.megatron.attention import PackedRuns, packed_runs
from learner.megatron.parallel import Place, Share


class PackedTokens(Protocol):
    """Sequences packed head to tail: `learner.batch.MicroBatch`, or less.

    Attributes:
        token_ids: Int[T].
        sequence_starts: Int[S+1], where each begins, and T.
        routed_experts: UInt8[T, choices], where the engine sent each; None where that is not to be replayed.
    """

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def sequence_starts(self) -> Tensor: ...
    @property
    def routed_experts(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Tokens:
    """One rank's tokens of a micro-batch; t of them, T in the micro-batch.

    Attributes:
        token_ids: Int[t].
        position_ids: Int[t].
        targets: Int[t], the token after each; 0 where it is of no interest.
        packed: The padded sequences of the whole micro-batch, as attention sees them.
        micro_index: Int[t], which token of the micro-batch each is; for padding, the last before it.
    """

    token_ids: Int[Tensor, " t"]
    position_ids: Int[Tensor, " t"]
    targets: Int[Tensor, " t"]
    packed: PackedRuns
    micro_index: Int[Tensor, " t"]
    _found_at: Int[Tensor, " tokens"]
    _is_first: Tensor
    _context: Share
    _sequence: Share | None

    def routes_of(self, batch: PackedTokens) -> UInt8[Tensor, "t_of_a_router choices"] | None:
        """Routes of the tokens that this rank's routers see: of its own, or its part where norms share them."""
        if batch.routed_experts is None:
            return None
        routes = batch.routed_experts[self.micro_index]
        if self._sequence is not None:
            routes = routes.chunk(self._sequence.size)[self._sequence.rank]
        return routes.to(self.token_ids.device)

    def of_the_batch(self, found: Float[Tensor, " t"]) -> Float[Tensor, " tokens"]:
        """What all ranks found for the targets, in the order of the micro-batch; 0 for the first of each sequence.

        The gradient is each rank's own part: it must be the same on all ranks that share the sequences.
        """
        if self._context.size > 1:
            found = gather_from_sequence_parallel_region(
                found, tensor_parallel_output_grad=False, group=self._context.group
            )
        return found[self._found_at].masked_fill(self._is_first, 0.0)


def shard_tokens(batch: PackedTokens, place: Place, device: torch.device) -> Tokens:
    """This rank's tokens of a batch, on the compute device."""
    token_ids, starts = batch.token_ids.numpy(), batch.sequence_starts.numpy().astype(np.int64)
    context, sequence = place.context, place.tensor if place.sequence else None
    is_whole = context.size == 1 and sequence is None
    found = _whole(token_ids, starts) if is_whole else _divided(token_ids, starts, context, sequence)
    return Tokens(
        token_ids=torch.from_numpy(token_ids[found.micro_index]).long().to(device),
        position_ids=torch.from_numpy(found.position).to(device),
        targets=torch.from_numpy(found.targets).long().to(device),
        packed=packed_runs(torch.from_numpy(found.padded_starts).int(), device, context.size),
        micro_index=torch.from_numpy(found.micro_index),
        _found_at=torch.from_numpy(found.before).to(device),
        _is_first=torch.from_numpy(found.is_first).to(device),
        _context=context,
        _sequence=sequence,
    )


class _Found(NamedTuple):
    """What `Tokens` is made of: t tokens of this rank, T of the batch.

    Attributes:
        micro_index: Which token of the batch each is, [t].
        position: Of each in its sequence, [t].
        targets: The token after each, [t]; 0 where it is of no interest.
        padded_starts: Where each sequence begins with its padding, and the end.
        before: Where the token before each token of the batch is among those of all ranks, [T].
        is_first: Whether it is the first of its sequence, [T].
    """

    micro_index: NDArray[np.int64]
    position: NDArray[np.int64]
    targets: NDArray[np.int32]
    padded_starts: NDArray[np.int64]
    before: NDArray[np.int64]
    is_first: NDArray[np.bool_]


def _whole(token_ids: NDArray[np.int32], starts: NDArray[np.int64]) -> _Found:
    """Where no ranks share tokens: what `_divided` would find, in a quarter of its time."""
    index = np.arange(len(token_ids))
    position = index - np.repeat(starts[:-1], np.diff(starts))
    targets = np.zeros_like(token_ids)
    targets[:-1] = token_ids[1:]
    targets[starts[1:] - 1] = 0
    return _Found(index, position, targets, starts, np.maximum(index - 1, 0), position == 0)


def _divided(token_ids: NDArray[np.int32], starts: NDArray[np.int64], context: Share, sequence: Share | None) -> _Found:
    lengths = np.diff(starts)
    multiple = 2 * context.size if context.size > 1 else 1
    padded = _padded(lengths, multiple, 1 if sequence is None else sequence.size)
    padded_starts = np.concatenate([[0], np.cumsum(padded)])
    owner = np.repeat(np.arange(len(lengths)), padded)
    position = np.arange(padded_starts[-1]) - padded_starts[owner]
    index = starts[owner] + np.minimum(position, lengths[owner] - 1)
    targets = token_ids[np.minimum(index + 1, len(token_ids) - 1)]
    targets[position >= lengths[owner] - 1] = 0
    own = np.repeat(np.arange(len(lengths)), lengths)
    at = np.arange(len(token_ids)) - starts[own]
    before = padded_starts[own] + np.maximum(at - 1, 0)
    if context.size > 1:
        order = np.concatenate([piece(padded_starts, rank, context.size) for rank in range(context.size)])
        before = np.argsort(order)[before]
    mine = piece(padded_starts, context.rank, context.size)
    return _Found(index[mine], position[mine], targets[mine], padded_starts, before, at == 0)


def piece(starts: NDArray[np.int64], rank: int, size: int) -> NDArray[np.int64]:
    """Where a context rank's tokens are among all, in its order.

    Args:
        starts: Where each sequence begins, and the end; lengths are multiples of 2·C where ranks share sequences.
        rank: Of the context ranks.
        size: They are as many, C.
    """
    if size == 1:
        return np.arange(starts[-1])
    half = np.diff(starts) // (2 * size)
    counts = np.repeat(half, 2)
    firsts = np.stack([starts[:-1] + rank * half, starts[:-1] + (2 * size - 1 - rank) * half], axis=1).ravel()
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(firsts - (ends - counts), counts)


def _padded(lengths: NDArray[np.int64], multiple: int, num_token_ranks: int) -> NDArray[np.int64]:
    """Lengths that are multiples, and whose sum is one of `multiple` times the ranks that share tokens."""
    padded = (lengths + multiple - 1) // multiple * multiple
    padded[-1] += -int(padded.sum()) % (multiple * num_token_ranks)
    return padded
