"""Plans of micro-batches: what every plan keeps to, and how good it is on a real step's lengths."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from learner.packing import ATTENTION_CROSSOVER, plan, sequence_costs

Plan = list[list[NDArray[np.int64]]]


@settings(max_examples=300)
@given(
    lengths=st.lists(st.integers(1, 100), max_size=150).map(lambda numbers: np.array(numbers, dtype=np.int64)),
    max_tokens=st.integers(100, 400),
    num_ranks=st.integers(1, 9),
)
def test_a_plan_is_whole_within_its_budget_even_and_always_the_same(
    lengths: NDArray[np.int64], max_tokens: int, num_ranks: int
) -> None:
    ranks = plan(lengths, max_tokens, num_ranks)
    bins = [members for rank in ranks for members in rank]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(lengths[members].sum() <= max_tokens for members in bins)
    assert all((np.diff(lengths[members]) <= 0).all() for members in bins)
    if len(lengths) >= len(bins):
        assert all(len(members) for members in bins)
    bound = -(-int(lengths.sum()) // max_tokens)
    assert len(bins) < 2 * bound + num_ranks
    assert as_lists(plan(lengths.copy(), max_tokens, num_ranks)) == as_lists(ranks)


@pytest.mark.parametrize("seed", range(3))
def test_a_large_step_is_tight_and_its_ranks_cost_the_same(seed: int) -> None:
    lengths = np.clip(np.random.default_rng(seed).lognormal(7.45, 0.8, 8192), 200, 8192).astype(np.int64)
    ranks = plan(lengths, 20_480, 8)
    bound = -(-int(lengths.sum()) // 20_480)
    assert bound / sum(map(len, ranks)) >= 0.99
    costs = sequence_costs(lengths, ATTENTION_CROSSOVER)
    totals = np.array([[costs[members].sum() for members in rank] for rank in ranks])
    assert totals.sum(1).max() <= 1.01 * totals.sum(1).mean()
    assert totals.max(0).sum() <= 1.02 * totals.mean(0).sum()


def test_where_there_is_room_every_rank_has_the_same_work() -> None:
    """16 sequences would fit into three micro-batches, but eight ranks are to share them."""
    assert [[len(members) for members in rank] for rank in plan(np.full(16, 3_000), 20_480, 8)] == [[2]] * 8


def test_a_sequence_twice_as_long_costs_more_than_twice_as_much() -> None:
    assert sequence_costs(np.array([8_192, 4_096]), 8_192).tolist() == [16_384.0, 6_144.0]
    lengths = np.array([8_192, 4_096, 4_096, 2_048])
    assert as_lists(plan(lengths, 16_384, 2, attention_crossover=8_192)) == [[[0]], [[1, 2, 3]]]


def test_fewer_sequences_than_ranks_leave_some_empty() -> None:
    assert [[len(members) for members in rank] for rank in plan(np.array([5, 4]), 10, 3)] == [[1], [1], [0]]


def test_no_sequences_are_no_micro_batches() -> None:
    assert plan(np.array([], dtype=np.int64), 10, 2) == [[], []]


def as_lists(ranks: Plan) -> list[list[list[int]]]:
    return [[members.tolist() for members in rank] for rank in ranks]
