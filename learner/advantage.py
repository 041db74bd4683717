"""Advantages of a group: how much better each completion did than its siblings."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EPSILON = 1e-6


def group_advantages(rewards: Float[Tensor, " group"], graded: Bool[Tensor, " group"]) -> Float[Tensor, " group"]:
    """(R - mean) / (sample std + 1e-6) over the graded completions of one group; 0 for the others.

    Args:
        rewards: Of each completion; without meaning where not graded.
        graded: Whether the completion has a reward. A failed grade is in no statistic.

    Returns:
        float64. All zeros where fewer than two completions are graded: there is nothing to compare.

    Source: GRPO, arXiv 2402.03300, section 4.1.2, with the sample standard deviation (n - 1).
    """
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    known = rewards[graded].double()
    if len(known) >= 2:
        advantages[graded] = (known - known.mean()) / (known.std() + EPSILON)
    return advantages
