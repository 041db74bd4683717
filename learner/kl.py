"""The divergence of the policy from a frozen reference, which the loss may charge for (docs/algorithm.md)."""

import torch
from jaxtyping import Float
from torch import Tensor

from learner.batch import MicroBatch
from learner.gspo import response_difference, response_mean


def kl_loss(
    micro: MicroBatch,
    learner_logprobs: Float[Tensor, " tokens"],
    reference_logprobs: Float[Tensor, " tokens"],
    num_completions: int,
) -> Float[Tensor, ""]:
    """This micro-batch's share of an update's mean divergence from the reference, before its coefficient.

    Per response token k3 = exp(x) - 1 - x with x = reference - learner: never negative, 0 where the two agree, and
    unbiased for tokens that the learner sampled. Neither staleness nor a clip weights it.

    Args:
        micro: The packed completions.
        learner_logprobs: Under the weights being updated, with gradient; outside the response they may be NaN.
        reference_logprobs: Under the reference's, without gradient; outside the response they may be NaN.
        num_completions: N, the unmasked completions of the whole update, on all ranks; at least 1.

    Returns:
        The sum over this micro-batch's unmasked completions of the mean k3 of their response tokens, divided by N;
        float64.

    Source: k3, the third estimator of J. Schulman, "Approximating KL Divergence", 2020; in the loss, with its gradient,
    as in GRPO, arXiv 2402.03300, equation 4.
    """
    ahead = response_difference(reference_logprobs, learner_logprobs, micro)
    divergence = response_mean(torch.expm1(ahead) - ahead, micro)
    return torch.where(micro.loss_mask, divergence, 0.0).sum() / num_completions
