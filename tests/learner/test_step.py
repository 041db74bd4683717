"""A step on a policy of pairs of tokens: what it trains, what it counts, what it reports."""

import math
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pytest
import torch

from common import wire
from common.config import Config
from common.errors import StallError
from common.learning import LearnerConfig, LossConfig, OptimizerConfig
from common.sections import SamplingConfig
from common.versions import Lineages, Version
from learner.batch import MicroBatch
from learner.measures import Measures, add_up, summarize
from learner.record import Stopwatch
from learner.step import SkipLimit, train_step
from learner.trainable import BatchShare, Loss, UpdateResult
from tests.clocks import ManualClock
from tests.learner.plain import PlainPolicy
from tests.learner.steps import CONFIG, VOCAB, groups, policy, step


def _moved_policy() -> PlainPolicy:
    """One that has learned since its reference was taken."""
    moved = policy()
    with torch.no_grad():
        moved.model.weight.add_(0.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)))
    return moved


def _divergence(weight: torch.Tensor) -> torch.Tensor:
    """Mean over the completions of `groups()` of the mean k3 of their tokens, in float64."""
    learner, reference = (torch.log_softmax(w.double(), -1) for w in (weight, policy().model.weight.detach()))
    means = []
    for training in groups():
        for completion in training.scored.group.completions:
            tokens = torch.tensor([5, *wire.ints(completion.token_ids).tolist()])
            x = (reference - learner)[tokens[:-1], tokens[1:]]
            means.append((x.exp() - 1 - x).mean())
    return torch.stack(means).mean()


def _all_wrong() -> tuple[wire.TrainingGroup, ...]:
    """The same completions, none of them right: their advantages are 0."""
    wrong = wire.Grade(outcome=wire.Outcome.WRONG, correct=0.0, reward=0.0)
    replace = msgspec.structs.replace
    return tuple(replace(t, scored=replace(t.scored, grades=(wrong,) * 4)) for t in groups())


def test_the_parts_of_a_step_are_timed() -> None:
    watch = Stopwatch()
    with watch("update"):
        train_step(policy(), groups(), CONFIG, Version(0, 2), Lineages(), watch=watch)
    times = watch.lap()
    parts = [times[f"{part}_s"] for part in ("recompute", "forward_backward", "optimizer")]
    assert min(parts[:2]) > 0
    assert sum(parts) <= times["update_s"] <= times["seconds"]
    assert set(watch.lap()) == {"seconds"}


def test_what_is_done_with_an_item_is_not_its_making() -> None:
    clock = ManualClock(0.0)
    watch = Stopwatch(clock)

    def make() -> Iterator[int]:
        for number in range(2):
            clock.now += 1.0
            yield number

    for _ in watch.each("export", make()):
        clock.now += 10.0
    assert watch.lap() == {"seconds": 22.0, "export_s": 2.0}


def test_buckets_of_staleness_and_length_add_up_to_the_whole() -> None:
    metrics = step()
    assert metrics["staleness_max"] == 2
    assert {name for name, value in metrics.items() if "_at_staleness_" in name and not math.isnan(value)} == {
        f"{share}_at_staleness_{bucket}"
        for share in ("clip_fraction", "staleness_clip_fraction")
        for bucket in ("0", "1", "2_3")
    }
    assert metrics["clip_fraction"] > 0
    assert metrics["clip_fraction"] == metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    sizes = {"0": 8, "1": 12, "2_3": 12}  # visit % 3 is the version, the learner's is 2
    whole = sum(metrics[f"clip_fraction_at_staleness_{bucket}"] * size for bucket, size in sizes.items()) / 32
    assert whole == pytest.approx(metrics["clip_fraction"])
    lengths = [c.num_tokens for g in groups() for c in g.scored.group.completions]
    quarters = [sum(2 * q < length <= 2 * q + 2 for length in lengths) for q in range(4)]
    whole = sum(metrics[f"clip_fraction_at_length_q{q + 1}"] * size for q, size in enumerate(quarters)) / 32
    assert whole == pytest.approx(metrics["clip_fraction"])


def test_the_first_update_of_a_step_is_inside_every_clip() -> None:
    config = Config(groups_per_step=8, group_size=4, updates_per_step=1, sampling=SamplingConfig(max_tokens=8))
    metrics = step(config)
    assert metrics["clip_fraction"] == 0
    assert metrics["ratio_mean"] == 1


def test_before_any_update_of_the_step_no_ratio_is_outside_the_clip() -> None:
    assert step()["noise_floor"] == 0
    assert step()["clip_fraction"] > 0


class _TwoPasses(PlainPolicy):
    """One whose forward pass without gradient is not the one that it learns from."""

    def __init__(self, off_by: float) -> None:
        super().__init__(policy().model, lr=0.05)
        self.share = BatchShare(multiple=2)
        self.num_asked = self.num_skipped = 0
        self._off_by = off_by

    def logprobs(self, micros: Sequence[MicroBatch]) -> list[torch.Tensor]:
        self.num_asked += len(micros)
        return [logprobs + self._off_by for logprobs in super().logprobs(micros)]


class _SkipsTheFirst(_TwoPasses):
    def update(self, micros: Sequence[MicroBatch], loss: Loss) -> UpdateResult:
        factor = math.nan if self.num_skipped == 0 else 1.0
        result = super().update(micros, lambda *given: factor * loss(*given))
        self.num_skipped += result.skipped
        return result


@pytest.mark.parametrize(("off_by", "floor"), [(5.0, 1), (-5.0, 1), (-0.0035, 0), (0.0035, 1), (0.0, 0)])
def test_the_noise_floor_is_what_two_forward_passes_are_apart(off_by: float, floor: float) -> None:
    config = msgspec.structs.replace(CONFIG, updates_per_step=1, learner=LearnerConfig(max_tokens_per_microbatch=24))
    different = _TwoPasses(off_by)
    metrics = train_step(different, groups(), config, Version(0, 2), Lineages())
    assert metrics["noise_floor"] == floor
    assert metrics["ratio_mean"] == 1  # it is trained on the pass that it learns from
    assert metrics["clip_fraction"] == 0
    assert different.num_asked == 2  # of many micro-batches: the fewest that a pipeline takes


def test_an_update_that_was_skipped_moved_nothing() -> None:
    config = msgspec.structs.replace(CONFIG, updates_per_step=2)
    different = _SkipsTheFirst(5.0)
    metrics = train_step(different, groups(), config, Version(0, 2), Lineages())
    assert different.num_skipped == metrics["skipped_updates"] == 1
    assert metrics["ratio_mean"] == 1
    assert metrics["noise_floor"] == 1


def test_against_the_generator_the_noise_floor_is_what_no_update_did() -> None:
    loss = LossConfig(clip_low=0.6, clip_high=0.6, proximal="generator")
    config = msgspec.structs.replace(CONFIG, loss=loss)
    table = torch.log_softmax(policy().model.weight.detach(), -1)
    order = np.random.default_rng([config.seed, 2]).permutation(8)
    first = [groups()[i] for i in order[:2]]  # of four updates
    ratios = []
    for completion in [c for training in first for c in training.scored.group.completions]:
        tokens = torch.tensor([5, *wire.ints(completion.token_ids).tolist()])
        ratios.append(float((table[tokens[:-1], tokens[1:]] + 2.0).double().mean().exp()))
    outside = [not 0.4 <= ratio <= 1.6 for ratio in ratios]
    assert 0 < sum(outside) < len(outside)
    assert step(config)["noise_floor"] == pytest.approx(sum(outside) / len(outside))


def test_what_the_loss_does_not_count_is_told_by_reason() -> None:
    config = msgspec.structs.replace(CONFIG, loss=LossConfig(truncated="mask"))
    batch = list(groups())
    outcomes = [wire.Outcome.TIMEOUT, wire.Outcome.ERROR, wire.Outcome.ERROR]
    for i, outcome in enumerate(outcomes):
        failed = wire.Grade(outcome=outcome, correct=0.0, reward=0.0)
        grades = (failed, *batch[i].scored.grades[1:])
        batch[i] = msgspec.structs.replace(batch[i], scored=msgspec.structs.replace(batch[i].scored, grades=grades))
    for i in (0, 5):  # the first of group 0 failed, too: it counts once
        completions = list(batch[i].scored.group.completions)
        completions[0] = msgspec.structs.replace(completions[0], finish_reason=wire.FinishReason.LENGTH)
        made = msgspec.structs.replace(batch[i].scored.group, completions=tuple(completions))
        batch[i] = msgspec.structs.replace(batch[i], scored=msgspec.structs.replace(batch[i].scored, group=made))
    metrics = step(config, tuple(batch))
    reasons = {name: metrics[f"num_masked_{name}"] for name in ("timeout", "error", "truncated")}
    assert reasons == {"timeout": 1, "error": 2, "truncated": 1}
    assert metrics["num_masked"] == 4


def test_groups_that_are_all_right_or_all_wrong_are_counted() -> None:
    uniform = [{grade.correct for grade in training.scored.grades} for training in groups()]
    metrics = step(batch=(*groups()[:4], *_all_wrong()[4:]))
    assert metrics["num_groups_wrong"] == 4 + sum(correct == {0.0} for correct in uniform[:4])
    assert metrics["num_groups_right"] == sum(correct == {1.0} for correct in uniform[:4])


def test_differences_and_weights_are_those_of_every_token() -> None:
    config = Config(groups_per_step=8, group_size=4, updates_per_step=1, sampling=SamplingConfig(max_tokens=8))
    metrics = step(config)
    table = torch.log_softmax(policy().model.weight.detach(), -1)
    differences, rhos = [], []
    for training in groups():
        for completion in training.scored.group.completions:
            tokens = torch.tensor([5, *wire.ints(completion.token_ids).tolist()])
            differences.append((table[tokens[:-1], tokens[1:]] + 2.0).double())
            rhos.append(float(differences[-1].mean().exp()))
    every = torch.cat(differences)
    assert metrics["logprob_difference_mean"] == pytest.approx(float(every.abs().mean()), rel=1e-6)
    assert metrics["logprob_difference_k3"] == pytest.approx(float((every.exp() - 1 - every).mean()), rel=1e-6)
    expected = float(every.abs().quantile(0.99, interpolation="higher"))
    assert metrics["logprob_difference_p99"] == pytest.approx(expected, rel=0.01)
    assert metrics["staleness_ratio_min"] == pytest.approx(min(rhos), rel=1e-6)
    assert metrics["staleness_ratio_max"] == pytest.approx(max(rhos), rel=1e-6)
    assert 0.5 <= metrics["weight_min"] <= metrics["weight_max"] <= 2.0


def test_what_is_too_long_is_left_out_and_counted() -> None:
    lengths = [c.num_tokens for g in groups() for c in g.scored.group.completions]
    small = LearnerConfig(max_tokens_per_microbatch=6)  # 2 of them are the prompt's
    config = Config(groups_per_step=8, group_size=4, sampling=SamplingConfig(max_tokens=8), learner=small)
    metrics = step(config)
    assert metrics["num_rejected"] == sum(length > 4 for length in lengths) > 0
    assert metrics["num_tokens"] == sum(2 + length for length in lengths if length <= 4)
    everything = step(config, groups(num_tokens=8))
    assert everything["num_rejected"] == 32
    assert everything["skipped_updates"] == 4
    assert everything["nonfinite_updates"] == 0
    assert math.isnan(everything["loss"])


def test_penalties_for_length_are_reported_beside_the_reward() -> None:
    loss = LossConfig(overlong_buffer=8, overlong_factor=0.8)
    config = Config(groups_per_step=8, group_size=4, sampling=SamplingConfig(max_tokens=8), loss=loss)
    metrics = step(config)
    lengths = [c.num_tokens for g in groups() for c in g.scored.group.completions]
    assert metrics["overlong_penalty"] == pytest.approx(0.1 * float(np.mean(lengths)))
    assert metrics["reward"] == step()["reward"]


def test_updates_that_are_no_numbers_end_the_run_after_so_many_steps() -> None:
    config = Config(optimizer=OptimizerConfig(max_skipped_steps=2))
    limit = SkipLimit(config)
    broken = policy()
    with torch.no_grad():
        broken.model.weight[0] = float("nan")
    bad = train_step(broken, groups(), CONFIG, Version(0, 2), Lineages())
    assert bad["skipped_updates"] == 4
    good = step()
    assert good["skipped_updates"] == 0
    for metrics in (bad, good, bad):
        limit.count(metrics)
    with pytest.raises(StallError, match=r"found 2 steps in a row .*max_skipped_steps = 2"):
        limit.count(bad)


def test_one_update_without_a_number_counts_and_one_without_completions_does_not() -> None:
    config = msgspec.structs.replace(CONFIG, optimizer=OptimizerConfig(max_skipped_steps=2))
    one_bad = train_step(_SkipsTheFirst(0.0), groups(), CONFIG, Version(0, 2), Lineages())
    assert (one_bad["skipped_updates"], one_bad["nonfinite_updates"]) == (1, 1)
    limit = SkipLimit(config)
    one_empty = one_bad | {"nonfinite_updates": 0.0}
    all_empty = one_empty | {"skipped_updates": 4.0}
    for metrics in (one_bad, one_empty, one_bad, one_empty, all_empty):
        limit.count(metrics)
    with pytest.raises(StallError, match=r"of the last one's 4 updates 1 were skipped, 1 for their gradients"):
        limit.count(one_bad)


def test_the_divergence_from_the_reference_is_in_the_loss_and_in_the_metrics() -> None:
    plain = msgspec.structs.replace(CONFIG, updates_per_step=1)
    config = msgspec.structs.replace(plain, loss=LossConfig(clip_low=3e-3, clip_high=4e-3, kl_coefficient=0.1))
    charged, free = (train_step(_moved_policy(), groups(), c, Version(0, 2), Lineages()) for c in (config, plain))
    wanted = float(_divergence(_moved_policy().model.weight.detach()))
    assert charged["kl"] == pytest.approx(wanted, rel=1e-6)
    assert charged["kl_loss"] == pytest.approx(0.1 * wanted, rel=1e-6)
    assert charged["loss"] - free["loss"] == pytest.approx(0.1 * wanted, rel=1e-5)
    assert math.isnan(free["kl"])
    assert math.isnan(free["kl_loss"])


def test_without_a_reward_to_gain_the_gradient_is_that_of_the_divergence() -> None:
    config = msgspec.structs.replace(CONFIG, updates_per_step=1, loss=LossConfig(kl_coefficient=0.1))
    weight = _moved_policy().model.weight.detach().double().requires_grad_()
    (0.1 * _divergence(weight)).backward()
    assert weight.grad is not None
    metrics = train_step(_moved_policy(), _all_wrong(), config, Version(0, 2), Lineages())
    assert metrics["loss"] == pytest.approx(metrics["kl_loss"], rel=1e-9)
    assert metrics["grad_norm"] == pytest.approx(float(weight.grad.norm()), rel=2e-6)


def test_the_first_update_is_at_the_reference_and_the_next_is_not() -> None:
    def divergence(num_updates: int) -> float:
        loss = LossConfig(clip_low=3e-3, clip_high=4e-3, kl_coefficient=0.1)
        return step(msgspec.structs.replace(CONFIG, updates_per_step=num_updates, loss=loss))["kl"]

    assert divergence(1) == 0
    assert divergence(4) > 0


def test_measures_of_parts_are_those_of_the_whole_and_nothing_is_nan() -> None:
    nothing = summarize(add_up([]), 8, 0.1)
    assert all(math.isnan(value) for name, value in nothing.items() if name != "num_tokens")
    some = Measures(torch.ones(2, 9, dtype=torch.float64), torch.ones(7, dtype=torch.float64), torch.arange(2048))
    twice = summarize(some + some, 8, 0.1)
    assert {n: v for n, v in twice.items() if n != "num_tokens" and not math.isnan(v)} == {
        n: v for n, v in summarize(some, 8, 0.1).items() if n != "num_tokens" and not math.isnan(v)
    }
