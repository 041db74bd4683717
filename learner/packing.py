"""Which sequences go together: micro-batches under a token budget, balanced over data-parallel ranks.

Source: best-fit decreasing (Johnson 1974) for the bins, longest processing time first (Graham 1969) for the ranks.
"""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

# A token costs as much in the linear layers as attention to this many earlier ones: 12 h^2 against 2 h a pair, with h
# the hidden size, is 6 h. Only the balance over ranks depends on it.
LINEAR_COST = 6 * 2048

Bins = list[list[int]]


def pack_sequences(lengths: NDArray[np.int64], max_tokens: int, num_ranks: int = 1) -> list[Bins]:
    """For each rank its bins, each a list of sequence numbers; the same for the same lengths.

    Every rank gets the same number of bins, so that ranks can step together; where there are too few sequences for
    that, some bins are empty. Sequences of one length stand side by side in a bin, so that attention can take them
    together.

    Args:
        lengths: Tokens of each sequence, shape [S], at least `num_ranks` of them.
        max_tokens: Of one bin.
        num_ranks: Data-parallel ranks.

    Raises:
        ValueError: A sequence is longer than `max_tokens`, or there are fewer sequences than ranks.
    """
    if len(lengths) < num_ranks:
        raise ValueError(f"found {len(lengths)} sequences, expected at least one for each of {num_ranks} ranks")
    if lengths.max(initial=0) > max_tokens:
        raise ValueError(
            f"found a sequence of {lengths.max()} tokens, expected at most "
            f"learner.max_tokens_per_microbatch = {max_tokens}"
        )
    costs = sequence_costs(lengths)
    bins = _best_fit_decreasing(lengths, max_tokens)
    while len(bins) % num_ranks:
        _split_costliest(bins, costs)
    return _spread(bins, costs, num_ranks)


def sequence_costs(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """What a sequence costs to train on, in pairs of tokens: attention is quadratic, the rest linear. Shape [S]."""
    tokens = lengths.astype(np.float64)
    return tokens * (LINEAR_COST + tokens / 2)


def _best_fit_decreasing(lengths: NDArray[np.int64], max_tokens: int) -> Bins:
    """Longest first, each into the fullest bin that has room for it."""
    bins: Bins = []
    rooms: list[int] = []  # sorted: room * (number of bins that there can be) + bin
    stride = len(lengths) + 1
    for sequence in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sequence])
        place = bisect_left(rooms, length * stride)
        if place == len(rooms):
            room, number = max_tokens, len(bins)
            bins.append([])
        else:
            room, number = divmod(rooms.pop(place), stride)
        bins[number].append(sequence)
        insort(rooms, (room - length) * stride + number)
    return bins


def _split_costliest(bins: Bins, costs: NDArray[np.float64]) -> None:
    """Makes two bins of the costliest one that has more than one sequence."""
    number = max(range(len(bins)), key=lambda i: (len(bins[i]) > 1, costs[bins[i]].sum()))
    whole = bins[number]
    bins[number] = whole[::2]
    bins.append(whole[1::2])


def _spread(bins: Bins, costs: NDArray[np.float64], num_ranks: int) -> list[Bins]:
    """Deals the bins to the ranks, costliest first, each to the rank that has least and still lacks bins."""
    bin_costs = np.array([costs[members].sum() for members in bins])
    ranks: list[Bins] = [[] for _ in range(num_ranks)]
    loads = np.zeros(num_ranks)
    for number in np.argsort(-bin_costs, kind="stable").tolist():
        rank = int(loads.argmin())
        ranks[rank].append(bins[number])
        loads[rank] += bin_costs[number]
        if len(ranks[rank]) == len(bins) // num_ranks:
            loads[rank] = np.inf
    return ranks
