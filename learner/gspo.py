"""The loss: sequence-level GSPO with two ratios, one for the trust region and one for staleness (docs/algorithm.md).

For completion i with advantage A and staleness d, means over its response tokens, sg = stop-gradient:

    s = exp(mean(learner - proximal))                  trust-region ratio
    ρ = exp(mean(sg[proximal] - generator))            staleness ratio
    w = ρ truncated to [1/c, c];  0 where d >= 1, A < 0 and log ρ < -δ
    ε = ε · h(d)
    loss = -(1/N) Σ w · min(s A, clip(s, 1 - ε_low, 1 + ε_high) A)

Source: GSPO, arXiv 2507.18071, equations 5 and 7; the staleness ratio and its clip are Sluice's.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from common.learning import LossConfig
from learner.batch import MicroBatch


@dataclass(frozen=True)
class LossStats:
    """What the loss did, as values per completion, so that they add up over micro-batches and ranks.

    Attributes:
        log_ratio: log s, Float[S], float64, detached.
        log_staleness_ratio: log ρ before truncation, Float[S], float64.
        weight: w, Float[S], float64; 0 where the staleness clip bound.
        clipped_low: Where the trust region's lower clip took the gradient away, Bool[S].
        clipped_high: The same of the upper clip, Bool[S].
        staleness_clipped: Where the staleness clip took the gradient away, Bool[S].
    """

    log_ratio: Tensor
    log_staleness_ratio: Tensor
    weight: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    staleness_clipped: Tensor


def gspo_loss(
    micro: MicroBatch,
    learner_logprobs: Float[Tensor, " tokens"],
    proximal_logprobs: Float[Tensor, " tokens"],
    num_completions: int,
    config: LossConfig,
) -> tuple[Float[Tensor, ""], LossStats]:
    """This micro-batch's share of the loss of an update.

    Args:
        micro: The packed completions. Outside the response its generator logprobs may hold anything, NaN too.
        learner_logprobs: Under the weights being updated, with gradient.
        proximal_logprobs: Under the trust region's centre (`proximal`), without gradient.
        num_completions: N, the unmasked completions of the whole update, on all ranks; at least 1.
        config: Clips and caps.

    Returns:
        The sum over this micro-batch's unmasked completions, divided by N (float64), and what it did.
    """
    log_ratio = response_mean(response_difference(learner_logprobs, proximal_logprobs, micro), micro)
    since_sampled = response_difference(proximal_logprobs, micro.generator_logprobs, micro).detach()
    log_staleness_ratio = response_mean(since_sampled, micro)
    advantages = micro.advantages.double()
    weight, staleness_clipped = staleness_weight(log_staleness_ratio, advantages, micro.staleness, config)
    low, high = trust_region(micro.staleness, config)
    ratio = log_ratio.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(low, high) * advantages
    surrogate = weight * torch.minimum(unclipped, clipped)
    loss = -torch.where(micro.loss_mask, surrogate, 0.0).sum() / num_completions
    binds = micro.loss_mask & (weight > 0) & (clipped < unclipped)
    stats = LossStats(
        log_ratio=log_ratio.detach(),
        log_staleness_ratio=log_staleness_ratio,
        weight=weight,
        clipped_low=binds & (advantages < 0),
        clipped_high=binds & (advantages > 0),
        staleness_clipped=staleness_clipped & micro.loss_mask,
    )
    return loss, stats


def proximal(
    micro: MicroBatch,
    learner_logprobs: Float[Tensor, " tokens"],
    at_step_start: Float[Tensor, " tokens"] | None,
    config: LossConfig,
) -> Float[Tensor, " tokens"]:
    """The trust region's centre, without gradient.

    Args:
        micro: The packed completions.
        learner_logprobs: Under the weights being updated.
        at_step_start: Under the weights at the start of the step; None where they are still the same.
        config: `recompute`, `interpolate` (a mixture that needs no second forward pass: the generator's share is
            1 / max(1, staleness)), or `generator`.
    """
    learner = learner_logprobs.detach()
    if config.proximal == "generator":
        return micro.generator_logprobs
    if config.proximal == "interpolate":
        share = 1.0 / micro.staleness.clamp(min=1).double()
        return torch.lerp(learner.double(), micro.generator_logprobs.double(), share[micro.sequence_of_token])
    return learner if at_step_start is None else at_step_start


def outside_trust_region(
    micro: MicroBatch,
    learner_logprobs: Float[Tensor, " tokens"],
    centre_logprobs: Float[Tensor, " tokens"],
    config: LossConfig,
) -> Bool[Tensor, " sequences"]:
    """Where s is outside the clip, whatever becomes of the gradient; a ratio that is no number is."""
    ratio = response_mean(response_difference(learner_logprobs, centre_logprobs, micro), micro).exp()
    low, high = trust_region(micro.staleness, config)
    return ~((low <= ratio) & (ratio <= high))


def staleness_weight(
    log_ratio: Float[Tensor, " sequences"],
    advantages: Float[Tensor, " sequences"],
    staleness: Int[Tensor, " sequences"],
    config: LossConfig,
) -> tuple[Float[Tensor, " sequences"], Bool[Tensor, " sequences"]]:
    """The weight w of each completion, and where the staleness clip set it to 0.

    A wrong completion that the policy has already made less likely since it was sampled teaches nothing more. The clip
    is tested before the ratio is truncated.
    """
    clipped = (staleness >= 1) & (advantages < 0) & (log_ratio < -config.staleness_clip)
    weight = log_ratio.exp().clamp(1 / config.weight_cap, config.weight_cap)
    return torch.where(clipped, 0.0, weight), clipped


def trust_region(
    staleness: Int[Tensor, " sequences"], config: LossConfig
) -> tuple[Float[Tensor, " sequences"], Float[Tensor, " sequences"]]:
    """Lower and upper bound of the trust-region ratio; narrower for stale completions where so configured."""
    h = (1.0 / (1.0 + config.narrowing * staleness.double())).clamp(min=config.narrowing_floor)
    return 1.0 - config.clip_low * h, 1.0 + config.clip_high * h


def response_difference(
    ahead: Float[Tensor, " tokens"], behind: Float[Tensor, " tokens"], micro: MicroBatch
) -> Float[Tensor, " tokens"]:
    """`ahead - behind` in float64, 0 outside the response; NaN there does not get in."""
    return torch.where(micro.response_mask, ahead.double() - behind.double(), 0.0)


def response_mean(values: Float[Tensor, " tokens"], micro: MicroBatch) -> Float[Tensor, " sequences"]:
    """Mean over each completion's response tokens of values that are 0 elsewhere."""
    sums = torch.segment_reduce(values, "sum", lengths=micro.lengths, unsafe=True)
    return sums / micro.response_lengths.clamp(min=1)
