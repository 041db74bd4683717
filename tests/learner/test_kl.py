"""The divergence from the reference against float64 NumPy, alone and in the whole loss."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from common.learning import LossConfig
from learner.gspo import gspo_loss, proximal
from learner.kl import kl_loss
from tests.learner.test_gspo import Example, packed, random_examples, reference

CLIPS = LossConfig(clip_low=0.03, clip_high=0.04, kl_coefficient=0.05)


def with_reference(examples: list[Example], seed: int) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Reference logprobs, packed with NaN in the prompts, and those of each response."""
    rng = np.random.default_rng(seed)
    responses = [(e.learner + rng.normal(0, 0.5, len(e.learner))).astype(np.float32) for e in examples]
    rows = [
        np.concatenate([np.full(e.prompt_tokens, np.nan, np.float32), r])
        for e, r in zip(examples, responses, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows)), responses


def expected_kl(examples: list[Example], responses: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """Mean over counted completions of the mean k3, and its gradient; written from docs/algorithm.md."""
    num = sum(e.counted for e in examples)
    total, gradients = 0.0, []
    for e, response in zip(examples, responses, strict=True):
        x = response.astype(np.float64) - e.learner.astype(np.float64)
        total += e.counted * float(np.mean(np.exp(x) - 1 - x)) / num
        gradients.append(e.counted * (1 - np.exp(x)) / len(x) / num)
    return total, gradients


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(1, 24), mode=st.sampled_from(["recompute", "interpolate"]))
def test_the_whole_loss_and_its_gradient_equal_the_reference(seed: int, num: int, mode: str) -> None:
    config = LossConfig(proximal=mode, clip_low=0.03, clip_high=0.04, kl_coefficient=0.05)
    examples = random_examples(seed, num)
    micro, learner, at_start = packed(examples)
    logprobs, responses = with_reference(examples, seed)
    learner.requires_grad_()
    counted = sum(e.counted for e in examples)
    value, _ = gspo_loss(micro, learner, proximal(micro, learner, at_start, config), counted, config)
    loss = value + config.kl_coefficient * kl_loss(micro, learner, logprobs, counted)
    loss.backward()
    expected, gradients, scale = reference(examples, config)
    divergence, of_divergence = expected_kl(examples, responses)
    assert abs(float(loss.detach()) - expected - 0.05 * divergence) <= 2e-6 * (scale + 0.05 * divergence)
    assert learner.grad is not None
    got, mask = learner.grad.numpy(), micro.response_mask.numpy()
    assert np.isfinite(got).all()
    assert (got[~mask] == 0).all()
    wanted = np.concatenate(gradients) + 0.05 * np.concatenate(of_divergence)
    assert np.abs(got[mask] - wanted).max() <= 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("learner", "reference", "k3", "gradient"),
    [
        (-1.0, -1.0, 0.0, 0.0),
        (-1.0, -1.0 + math.log(2), 1 - math.log(2), -1.0),  # half as likely as under the reference: pulled up
        (-1.0, -1.0 - math.log(2), math.log(2) - 0.5, 0.5),  # twice as likely: pulled down
    ],
)
def test_k3_of_one_token_in_numbers(learner: float, reference: float, k3: float, gradient: float) -> None:
    example = Example(np.full(1, learner, np.float32), *(np.zeros(1, np.float32),) * 2, 0.0, 0, prompt_tokens=1)
    micro, logprobs, _ = packed([example])
    logprobs.requires_grad_()
    kl = kl_loss(micro, logprobs, torch.tensor([math.nan, reference]), 1)
    kl.backward()
    assert float(kl.detach()) == pytest.approx(k3, abs=1e-6)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, gradient], abs=1e-6)


def test_no_clip_and_no_age_weights_it() -> None:
    examples = random_examples(3, 6)
    micro, learner, _ = packed(examples)
    logprobs, _ = with_reference(examples, 3)
    for e in examples:
        e.staleness, e.advantage, e.generator = 9, -1.0, e.generator + 4  # the staleness clip takes them all
    stale, _, at_start = packed(examples)
    _, stats = gspo_loss(stale, learner, at_start, 6, CLIPS)
    assert (stats.weight == 0).all()
    assert float(kl_loss(stale, learner, logprobs, 6)) == float(kl_loss(micro, learner, logprobs, 6)) > 0
