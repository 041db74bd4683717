"""Packing: nothing lost, the budget kept, ranks alike."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from learner.packing import pack_sequences, sequence_costs


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=8, max_size=200),
    max_tokens=st.integers(100, 400),
    num_ranks=st.sampled_from([1, 2, 3, 8]),
)
def test_every_sequence_is_in_one_bin_and_every_rank_has_as_many_bins(
    lengths: list[int], max_tokens: int, num_ranks: int
) -> None:
    ranks = pack_sequences(np.array(lengths), max_tokens, num_ranks)
    assert len(ranks) == num_ranks
    assert len({len(bins) for bins in ranks}) == 1
    bins = [members for bins in ranks for members in bins]
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    for members in bins:
        assert sum(lengths[i] for i in members) <= max_tokens
    assert all(bins) or max(map(len, bins)) == 1
    assert ranks == pack_sequences(np.array(lengths), max_tokens, num_ranks)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200))
def test_no_two_bins_would_fit_into_one(lengths: list[int]) -> None:
    (bins,) = pack_sequences(np.array(lengths), 100)
    totals = sorted(sum(lengths[i] for i in members) for members in bins)
    assert len(totals) < 2 or totals[0] + totals[1] > 100


def test_sequences_of_one_length_stand_side_by_side() -> None:
    (bins,) = pack_sequences(np.array([5, 3, 5, 3, 5, 3]), 100)
    assert bins == [[0, 2, 4, 1, 3, 5]]


def test_a_long_sequence_weighs_more_than_its_tokens() -> None:
    """Rank 0 gets the long sequence, rank 1 both halves: attention makes the whole costlier than its halves."""
    whole, half = sequence_costs(np.array([20_000, 10_000]))
    assert whole > 2 * half
    assert pack_sequences(np.array([10_000, 20_000, 10_000]), 20_000, 2) == [[[1]], [[0, 2]]]


def test_what_cannot_be_packed_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"found a sequence of 30 tokens, expected at most .* = 20"):
        pack_sequences(np.array([10, 30]), 20)
    with pytest.raises(ValueError, match="found 1 sequences, expected at least one for each of 2 ranks"):
        pack_sequences(np.array([10]), 20, 2)
