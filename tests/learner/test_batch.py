"""Advantages and packing."""

import math
import typing
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from common import wire
from common.config import Config
from common.learning import LossConfig
from common.sections import SamplingConfig
from common.versions import Lineages, Version
from learner.advantage import group_advantages, overlong_penalty
from learner.batch import Sequence, completion_staleness, pack, split_long, step_sequences
from learner.ledger.judgement import uniform_reason
from tests import groups

Kind = Literal["std", "mean", "leave_one_out"]


def test_advantages_are_written_out_for_one_group() -> None:
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([True, True, True, True]))
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert advantages.tolist() == pytest.approx([expected, -expected, -expected, expected])


def test_a_failed_grade_is_in_no_statistic() -> None:
    advantages = group_advantages(torch.tensor([1.0, 0.0, 99.0]), torch.tensor([True, True, False]))
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert advantages.tolist() == pytest.approx([expected, -expected, 0.0])


@pytest.mark.parametrize(
    ("kind", "expected"), [("mean", [0.75, -0.25, -0.25, -0.25]), ("leave_one_out", [1.0, -1 / 3, -1 / 3, -1 / 3])]
)
def test_other_advantages_are_written_out(kind: Kind, expected: list[float]) -> None:
    rewards, graded = torch.tensor([1.0, 0.0, 0.0, 0.0, 9.0]), torch.tensor([True, True, True, True, False])
    assert group_advantages(rewards, graded, kind).tolist() == pytest.approx([*expected, 0.0])


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others() -> None:
    rewards = [0.3, 1.0, -0.5]
    advantages = group_advantages(torch.tensor(rewards), torch.ones(3, dtype=torch.bool), "leave_one_out").tolist()
    assert advantages == pytest.approx([0.3 - 0.25, 1.0 + 0.1, -0.5 - 0.65])


def test_the_penalty_of_a_long_answer_grows_over_the_buffer() -> None:
    lengths = torch.tensor([1, 80, 85, 90, 100])
    assert overlong_penalty(lengths, 100, 20, 1.0).tolist() == [0.0, 0.0, 0.25, 0.5, 1.0]
    assert overlong_penalty(lengths, 100, 20, 0.4).tolist() == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.4])
    assert not overlong_penalty(lengths, 100, 0, 1.0).any()


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=32),
    st.sampled_from(typing.get_args(Kind)),
)
def test_advantages_are_centred_and_fewer_than_two_grades_teach_nothing(
    pairs: list[tuple[float, bool]], kind: Kind
) -> None:
    rewards = torch.tensor([reward for reward, _ in pairs], dtype=torch.float64)
    graded = torch.tensor([known for _, known in pairs])
    advantages = group_advantages(rewards, graded, kind)
    assert torch.isfinite(advantages).all()
    assert (advantages[~graded] == 0).all()
    assert abs(float(advantages.sum())) < 1e-6 * len(pairs)
    if int(graded.sum()) < 2:
        assert not advantages.any()


def sequence(prompt: int, response: int, tag: int = 0) -> Sequence:
    return Sequence(
        prompt=np.full(prompt, tag, np.int32),
        response=np.arange(response, dtype=np.int32),
        generator_logprobs=np.full(response, -0.5, np.float32),
        advantage=float(tag),
        staleness=tag,
    )


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 40)), min_size=1, max_size=60),
    room=st.integers(60, 200),
)
def test_packing_loses_nothing_and_keeps_the_budget(lengths: list[tuple[int, int]], room: int) -> None:
    sequences = [sequence(prompt, response, tag) for tag, (prompt, response) in enumerate(lengths)]
    micros = pack(sequences, room)
    assert all(micro.num_tokens <= room for micro in micros)
    assert sorted(int(a) for micro in micros for a in micro.advantages) == list(range(len(lengths)))
    for micro in micros:
        starts = micro.sequence_starts.tolist()
        for i, tag in enumerate(int(a) for a in micro.advantages):
            prompt, response = lengths[tag]
            span = slice(starts[i], starts[i + 1])
            assert micro.position_ids[span].tolist() == list(range(prompt + response))
            assert micro.response_mask[span].tolist() == [False] * prompt + [True] * response
            assert micro.token_ids[span].tolist() == [tag] * prompt + list(range(response))
            assert (micro.sequence_of_token[span] == i).all()
            assert int(micro.staleness[i]) == tag
        assert torch.isnan(micro.generator_logprobs[~micro.response_mask]).all()
        assert not torch.isnan(micro.generator_logprobs[micro.response_mask]).any()
    assert [m.token_ids.tolist() for m in pack(sequences, room)] == [m.token_ids.tolist() for m in micros]


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=60),
    room=st.integers(60, 200),
    num_ranks=st.sampled_from([1, 2, 3, 8]),
)
def test_ranks_share_the_sequences_and_have_as_many_micro_batches(
    lengths: list[int], room: int, num_ranks: int
) -> None:
    sequences = [sequence(1, length - 1, tag) for tag, length in enumerate(lengths)]
    ranks = [pack(sequences, room, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert len({len(micros) for micros in ranks}) == 1
    micros = [micro for rank in ranks for micro in rank]
    assert all(0 < micro.num_tokens <= room for micro in micros)
    counted = [int(a) for micro in micros for a in micro.advantages[micro.loss_mask]]
    assert sorted(counted) == list(range(len(lengths)))
    if len(lengths) >= len(micros):
        assert all(micro.loss_mask.all() for micro in micros)


def test_what_does_not_fit_a_micro_batch_is_told_apart() -> None:
    fitting, num_rejected = split_long([sequence(2, 18), sequence(2, 19), sequence(1, 1)], 20)
    assert [s.num_tokens for s in fitting] == [20, 2]
    assert num_rejected == 1


def test_a_sequence_longer_than_a_micro_batch_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"found a sequence of 30 tokens, expected at most .* = 20"):
        pack([sequence(10, 20)], 20)


def completion(
    spans: list[tuple[int, int, int]], reason: wire.FinishReason = wire.FinishReason.STOP
) -> wire.Completion:
    num = spans[-1][0]
    versions = [wire.VersionSpan(end, Version(lineage, number)) for end, lineage, number in spans]
    return groups.completion(list(range(num)), [-0.1] * num, versions, reason=reason)


def test_a_completion_is_as_old_as_its_oldest_token() -> None:
    lineages = Lineages()
    assert completion_staleness(completion([(3, 0, 5), (9, 0, 7)]), Version(0, 8), lineages) == 3
    assert completion_staleness(completion([(9, 0, 8)]), Version(0, 8), lineages) == 0


def test_a_token_of_an_abandoned_lineage_is_older_than_its_number_says() -> None:
    """Lineage 1 branched from 0.10; a token of 0.13 is three updates off that path, and the learner two along it."""
    lineages = Lineages().opened_at(Version(0, 10))
    assert completion_staleness(completion([(4, 0, 13)]), Version(1, 12), lineages) == 5
    assert completion_staleness(completion([(4, 0, 9)]), Version(1, 12), lineages) == 3


def training_group(rewards: list[float | None], reasons: list[wire.FinishReason]) -> wire.TrainingGroup:
    completions = [completion([(3 + i, 0, 0)], reason) for i, reason in enumerate(reasons)]
    return groups.training_group([4, 5], completions, map(groups.grade, rewards))


def test_what_failed_or_was_cut_is_kept_out_of_the_loss_as_configured() -> None:
    reasons = [wire.FinishReason.STOP, wire.FinishReason.LENGTH, wire.FinishReason.STOP, wire.FinishReason.STOP]
    training = training_group([1.0, 0.0, None, 0.0], reasons)
    rng = np.random.default_rng(0)

    def lengths(config: Config) -> list[int]:
        (sequences,) = step_sequences((training,), config, Version(0, 1), Lineages(), rng)
        return [len(s.response) for s in sequences]

    assert lengths(Config()) == [3, 4, 6]
    assert lengths(Config(loss=LossConfig(truncated="mask"))) == [3, 6]


def test_long_answers_are_worth_less_but_correct_stays_correct() -> None:
    """Four right answers of 3 to 6 tokens, the limit 6 and the buffer 2: only their lengths tell them apart."""
    training = training_group([1.0] * 4, [wire.FinishReason.STOP] * 4)
    loss = LossConfig(overlong_buffer=2, overlong_factor=0.5, advantage="mean")
    config = Config(sampling=SamplingConfig(max_tokens=6), loss=loss)
    (sequences,) = step_sequences((training,), config, Version(0, 0), Lineages(), np.random.default_rng(0))
    assert [s.advantage for s in sequences] == pytest.approx([0.1875, 0.1875, -0.0625, -0.3125])
    assert uniform_reason(training.scored.grades)


def test_shuffled_rewards_are_the_same_rewards_in_another_order() -> None:
    rewards: list[float | None] = [1.0] * 8 + [0.0] * 8
    training = training_group(rewards, [wire.FinishReason.STOP] * 16)
    config = Config(loss=LossConfig(shuffle_rewards=True))
    orders = {
        tuple(
            s.advantage > 0
            for s in step_sequences((training,), config, Version(0, 0), Lineages(), np.random.default_rng(seed))[0]
        )
        for seed in range(8)
    }
    assert len(orders) > 1
    assert all(sum(order) == 8 for order in orders)
