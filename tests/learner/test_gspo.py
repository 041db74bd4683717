"""The loss against a float64 NumPy reference that is written from docs/algorithm.md, completion by completion."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from common.learning import LossConfig
from learner.batch import MicroBatch
from learner.gspo import gspo_loss, proximal


@dataclass
class Example:
    """One completion: per-token logprobs of its response, and what the loss knows of it."""

    learner: np.ndarray
    at_start: np.ndarray
    generator: np.ndarray
    advantage: float
    staleness: int
    counted: bool = True
    prompt_tokens: int = 2


def reference(examples: list[Example], config: LossConfig) -> tuple[float, list[np.ndarray], float]:
    """Loss, its gradient with respect to each learner logprob, and the mean of |w s A|."""
    num = sum(e.counted for e in examples)
    loss, scale, gradients = 0.0, 0.0, []
    for e in examples:
        gradient = np.zeros(len(e.learner))
        gradients.append(gradient)
        if not e.counted:
            continue
        learner, generator = e.learner.astype(np.float64), e.generator.astype(np.float64)
        centre = {
            "recompute": e.at_start.astype(np.float64),
            "generator": generator,
            "interpolate": learner + (generator - learner) / max(1, e.staleness),
        }[config.proximal]
        s = math.exp(np.mean(learner - centre))
        log_rho = float(np.mean(centre - generator))
        rho = math.exp(log_rho)
        w = min(max(rho, 1 / config.weight_cap), config.weight_cap)
        if e.staleness >= 1 and e.advantage < 0 and log_rho < -config.staleness_clip:
            w = 0.0
        h = max(config.narrowing_floor, 1 / (1 + config.narrowing * e.staleness))
        low, high = 1 - config.clip_low * h, 1 + config.clip_high * h
        unclipped, clipped = s * e.advantage, min(max(s, low), high) * e.advantage
        loss -= w * min(unclipped, clipped) / num
        scale += abs(w * s * e.advantage) / num
        if unclipped <= clipped:
            gradient += -w * s * e.advantage / len(e.learner) / num
    return loss, gradients, scale


def packed(examples: list[Example]) -> tuple[MicroBatch, torch.Tensor, torch.Tensor]:
    """A micro-batch whose prompts are full of NaN, with learner and step-start logprobs."""
    columns: dict[str, list[np.ndarray]] = {"learner": [], "at_start": [], "generator": []}
    lengths = [e.prompt_tokens + len(e.learner) for e in examples]
    for e in examples:
        for name, column in columns.items():
            column.append(np.concatenate([np.full(e.prompt_tokens, np.nan), getattr(e, name)]).astype(np.float32))
    learner, at_start, generator = (torch.from_numpy(np.concatenate(c)) for c in columns.values())
    starts = np.concatenate([[0], np.cumsum(lengths)])
    owner = np.repeat(np.arange(len(examples)), lengths)
    positions = np.arange(starts[-1]) - starts[owner]
    micro = MicroBatch(
        token_ids=torch.zeros(int(starts[-1]), dtype=torch.long),
        position_ids=torch.from_numpy(positions),
        sequence_starts=torch.from_numpy(starts).int(),
        response_mask=torch.from_numpy(positions >= np.array([e.prompt_tokens for e in examples])[owner]),
        sequence_of_token=torch.from_numpy(owner),
        generator_logprobs=generator,
        advantages=torch.tensor([e.advantage for e in examples], dtype=torch.float64),
        staleness=torch.tensor([e.staleness for e in examples]),
        loss_mask=torch.tensor([e.counted for e in examples]),
    )
    return micro, learner, at_start


def assert_equals_reference(examples: list[Example], config: LossConfig) -> None:
    micro, learner, at_start = packed(examples)
    learner.requires_grad_()
    num = sum(e.counted for e in examples)
    loss, _ = gspo_loss(micro, learner, proximal(micro, learner, at_start, config), num, config)
    loss.backward()
    expected, gradients, scale = reference(examples, config)
    assert abs(float(loss.detach()) - expected) <= 2e-6 * scale
    assert learner.grad is not None
    got = learner.grad.numpy()
    assert np.isfinite(got).all()
    assert (got[~micro.response_mask.numpy()] == 0).all()
    wanted = np.concatenate(gradients)
    assert np.abs(got[micro.response_mask.numpy()] - wanted).max() <= 2e-6 * max(np.abs(wanted).max(), 1e-30)


def random_examples(seed: int, num: int, longest: int = 40) -> list[Example]:
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(num):
        length = int(rng.integers(1, longest))
        at_start = -rng.exponential(1.0, length)
        learner = at_start + rng.normal(0, 0.03) + rng.normal(0, 0.02, length)
        generator = at_start + rng.normal(0, 0.3) + rng.normal(0, 0.1, length)
        parts = [part.astype(np.float32) for part in (learner, at_start, generator)]
        advantage, staleness = float(rng.normal()), int(rng.integers(0, 9))
        examples.append(Example(*parts, advantage, staleness, bool(rng.random() < 0.8), int(rng.integers(1, 6))))
    examples[0].counted = True
    return examples


@pytest.mark.parametrize("mode", ["recompute", "interpolate", "generator"])
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num=st.integers(1, 24),
    clip=st.sampled_from([3e-4, 0.03, 0.3]),
    delta=st.sampled_from([0.0, 0.1, math.inf]),
    narrowing=st.sampled_from([0.0, 0.25, 5.0]),
)
def test_loss_and_gradients_equal_the_reference_on_ragged_lengths_and_nan_padding(
    mode: str, seed: int, num: int, clip: float, delta: float, narrowing: float
) -> None:
    config = LossConfig(proximal=mode, clip_low=clip, clip_high=clip * 4 / 3, staleness_clip=delta, narrowing=narrowing)
    assert_equals_reference(random_examples(seed, num), config)


def test_long_completions_keep_their_precision() -> None:
    assert_equals_reference(random_examples(7, 6, longest=8000), LossConfig(clip_low=0.03, clip_high=0.04))


def test_a_group_of_one_and_a_batch_of_masked_completions_have_finite_loss() -> None:
    alone = random_examples(1, 1)
    assert_equals_reference(alone, LossConfig())
    masked = random_examples(2, 5)
    for example in masked:
        example.counted = False
    micro, learner, at_start = packed(masked)
    learner.requires_grad_()
    loss, stats = gspo_loss(micro, learner, at_start, 1, LossConfig())
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert learner.grad is not None
    assert not learner.grad.any()
    assert not (stats.clipped_low | stats.clipped_high | stats.staleness_clipped).any()


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "has_gradient"),
    [
        (1.0, 0.039, True),  # inside
        (1.0, 0.040, False),  # above 1.04: a right answer is likely enough
        (-1.0, 0.040, True),  # a wrong one that became likelier is pulled back
        (-1.0, -0.030, True),  # exp(-0.030) = 0.9704, inside
        (-1.0, -0.031, False),  # below 0.97: a wrong answer is unlikely enough
        (1.0, -0.031, True),
    ],
)
def test_the_trust_region_takes_the_gradient_away_only_past_its_edge(
    advantage: float, log_ratio: float, has_gradient: bool
) -> None:
    config = LossConfig(clip_low=0.03, clip_high=0.04)
    at_start = np.full(4, -1.0, np.float32)
    micro, learner, start = packed([Example(at_start + np.float32(log_ratio), at_start, at_start, advantage, 0)])
    learner.requires_grad_()
    loss, stats = gspo_loss(micro, learner, start, 1, config)
    loss.backward()
    assert learner.grad is not None
    assert bool(learner.grad.any()) == has_gradient
    assert bool((stats.clipped_low | stats.clipped_high).any()) == (not has_gradient)


@pytest.mark.parametrize(
    ("advantage", "staleness", "log_ratio", "weight"),
    [
        (-1.0, 1, -0.11, 0.0),  # wrong, stale, already less likely: nothing more to learn
        (-1.0, 1, -0.09, math.exp(-0.09)),
        (-1.0, 0, -0.11, math.exp(-0.11)),  # fresh: a mismatch of engines is no staleness
        (1.0, 8, -0.11, math.exp(-0.11)),  # a right answer is never clipped for its age
        (-1.0, 3, -5.0, 0.0),  # tested before truncation
        (1.0, 3, -5.0, 0.5),
        (1.0, 3, 5.0, 2.0),
    ],
)
def test_the_staleness_ratio_is_clipped_on_one_side_and_then_truncated(
    advantage: float, staleness: int, log_ratio: float, weight: float
) -> None:
    generator = np.full(3, -6.0, np.float32)
    start = generator + np.float32(log_ratio)
    micro, learner, at_start = packed([Example(start, start, generator, advantage, staleness)])
    _, stats = gspo_loss(micro, learner, at_start, 1, LossConfig())
    assert float(stats.weight[0]) == pytest.approx(weight, rel=1e-5)


def test_with_the_generator_as_centre_it_is_equation_5_of_the_paper() -> None:
    """arXiv 2507.18071, equations 5 and 7, for one group of four with the paper's clips."""
    config = LossConfig(proximal="generator", staleness_clip=math.inf, clip_low=3e-4, clip_high=4e-4)
    examples = random_examples(11, 4)
    for example in examples:
        example.counted = True
        drift = np.random.default_rng(len(example.learner)).normal(0, 4e-4)
        example.learner = (example.generator + np.float32(drift)).astype(np.float32)
    micro, learner, _ = packed(examples)
    loss, _ = gspo_loss(micro, learner, proximal(micro, learner, None, config), 4, config)
    objective = 0.0
    for e in examples:
        s = (np.exp(e.learner.astype(np.float64).sum()) / np.exp(e.generator.astype(np.float64).sum())) ** (
            1 / len(e.learner)
        )
        objective += min(s * e.advantage, float(np.clip(s, 1 - 3e-4, 1 + 4e-4)) * e.advantage) / 4
    assert float(loss.detach()) == pytest.approx(-objective, rel=2e-6)


def test_the_first_update_of_a_step_has_ratio_one_and_a_gradient() -> None:
    micro, learner, _ = packed(random_examples(3, 8))
    learner.requires_grad_()
    loss, stats = gspo_loss(micro, learner, proximal(micro, learner, None, LossConfig()), 8, LossConfig())
    loss.backward()
    assert (stats.log_ratio == 0).all()
    assert learner.grad is not None
    assert learner.grad.any()


def test_micro_batches_of_an_update_add_up_to_the_whole() -> None:
    examples = random_examples(5, 12)
    num = sum(e.counted for e in examples)
    config = LossConfig(clip_low=0.03, clip_high=0.04)

    def loss_of(part: list[Example]) -> float:
        micro, learner, at_start = packed(part)
        return float(gspo_loss(micro, learner, at_start, num, config)[0])

    assert loss_of(examples[:5]) + loss_of(examples[5:]) == pytest.approx(loss_of(examples), rel=1e-12)
