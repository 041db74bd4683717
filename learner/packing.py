"""Which sequences share a micro-batch, and which data-parallel rank gets it: a function of their lengths alone."""

from bisect import bisect_left, insort
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
from numpy.typing import NDArray

ATTENTION_CROSSOVER = 16_384
_ID_BITS = 32


def plan(
    lengths: NDArray[np.int64],
    max_tokens: int,
    num_ranks: int = 1,
    multiple: int = 1,
    attention_crossover: int = ATTENTION_CROSSOVER,
) -> list[list[NDArray[np.int64]]]:
    """The micro-batches of each rank, as indices of sequences, longest first.

    Every rank gets the same number of micro-batches, of at most `max_tokens` each, and its i-th costs about what the
    other ranks' i-th do, since ranks that exchange experts wait for each other in each. The same lengths give the same
    plan, so each rank can make it alone.

    Args:
        lengths: Tokens of each sequence, at least 1.
        max_tokens: Of a micro-batch.
        num_ranks: Data-parallel ranks.
        multiple: What the number of each rank's micro-batches is a multiple of.
        attention_crossover: Length at which attention, quadratic, costs as much as all the rest, linear.

    Returns:
        Of each rank its micro-batches. A micro-batch is empty only where there are too few sequences.

    Raises:
        ValueError: A sequence is longer than `max_tokens`.
    """
    if not len(lengths):
        return [[] for _ in range(num_ranks)]
    if (longest := int(lengths.max())) > max_tokens:
        raise ValueError(
            f"found a sequence of {longest} tokens, expected at most learner.max_tokens_per_microbatch = {max_tokens}"
        )
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    costs = sequence_costs(ordered, attention_crossover)
    bins = _fill(ordered, costs, max_tokens, num_ranks * multiple)
    ranks = _deal([float(costs[b].sum()) for b in bins], num_ranks)
    return [[order[bins[i]] for i in rank] for rank in ranks]


def sequence_costs(lengths: NDArray[np.int64], attention_crossover: int) -> NDArray[np.float64]:
    """Cost of each sequence in units of one token without attention: linear and quadratic part."""
    return lengths * (1.0 + lengths / attention_crossover)


def _fill(
    lengths: NDArray[np.int64], costs: NDArray[np.float64], max_tokens: int, multiple: int
) -> list[NDArray[np.int64]]:
    """As few micro-batches as fit, a multiple of `multiple`: of even cost where there is room for that, else tight.

    Args:
        lengths: Longest first.
        costs: Of the same sequences.
        max_tokens: Of a micro-batch.
        multiple: What their number is a multiple of.
    """
    least = _multiple(-(-int(lengths.sum()) // max_tokens), multiple)
    owner = _even(lengths, costs, max_tokens, least)
    if owner is None:
        owner = _tight(lengths, max_tokens)
        wanted = _multiple(max(owner) + 1, multiple)
        even = _even(lengths, costs, max_tokens, wanted) if wanted > least else None
        owner = even or _split(owner, costs, wanted)
        least = wanted
    owners = np.array(owner)
    members = np.argsort(owners, kind="stable")
    return np.split(members, np.searchsorted(owners[members], np.arange(1, least)))


def _even(lengths: NDArray[np.int64], costs: NDArray[np.float64], max_tokens: int, num_bins: int) -> list[int] | None:
    """The bin of each sequence: longest first, each to the cheapest bin. None where one does not fit there."""
    cheapest: list[tuple[float, int, int]] = [(0.0, i, max_tokens) for i in range(num_bins)]
    heapify(cheapest)
    owner: list[int] = []
    for length, cost in zip(lengths.tolist(), costs.tolist(), strict=True):
        total, i, room = cheapest[0]
        if room < length:
            return None
        heapreplace(cheapest, (total + cost, i, room - length))
        owner.append(i)
    return owner


def _tight(lengths: NDArray[np.int64], max_tokens: int) -> list[int]:
    """The bin of each sequence: longest first, each to the fullest bin that has room, or to a new one."""
    shortest = int(lengths[-1])
    rooms: list[int] = []  # ascending: room left, then the bin's number in the low bits
    owner: list[int] = []
    num_bins = 0
    for length in lengths.tolist():
        place = bisect_left(rooms, length << _ID_BITS)
        if place < len(rooms):
            room = rooms.pop(place)
        else:
            room = max_tokens << _ID_BITS | num_bins
            num_bins += 1
        owner.append(room & ((1 << _ID_BITS) - 1))
        room -= length << _ID_BITS
        if room >> _ID_BITS >= shortest:
            insort(rooms, room)
    return owner


def _split(owner: list[int], costs: NDArray[np.float64], num_bins: int) -> list[int]:
    """Halves the most costly bins until there are `num_bins` of them, or none has two sequences."""
    members: dict[int, list[int]] = {}
    for sequence, i in enumerate(owner):
        members.setdefault(i, []).append(sequence)
    heap = [(-float(costs[m].sum()), i) for i, m in members.items() if len(m) > 1]
    heapify(heap)
    for new in range(len(members), num_bins):
        if not heap:
            break
        _, old = heappop(heap)
        members[old], members[new] = members[old][::2], members[old][1::2]
        for i in (old, new):
            if len(members[i]) > 1:
                heappush(heap, (-float(costs[members[i]].sum()), i))
    result = [0] * len(owner)
    for i, sequences in members.items():
        for sequence in sequences:
            result[sequence] = i
    return result


def _deal(costs: list[float], num_ranks: int) -> list[list[int]]:
    """The bins of each rank: rounds of `num_ranks` bins of like cost, the costliest to the rank with least so far."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    costliest = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    for at in range(0, len(costs), num_ranks):
        poorest = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        for rank, i in zip(poorest, costliest[at : at + num_ranks], strict=True):
            ranks[rank].append(i)
            totals[rank] += costs[i]
    return ranks


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
