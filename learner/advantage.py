"""Advantages of a group: how much better each completion did than its siblings."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EPSILON = 1e-6


def group_advantages(
    rewards: Float[Tensor, "*groups group"],
    graded: Bool[Tensor, "*groups group"],
    kind: Literal["std", "mean", "leave_one_out"] = "std",
) -> Float[Tensor, "*groups group"]:
    """How far each graded completion of a group is above its siblings; 0 for the others.

    Args:
        rewards: Of each completion; without meaning where not graded.
        graded: Whether the completion has a reward. A failed grade is in no statistic.
        kind: `std`: (R - mean) / (sample std + 1e-6); `mean`: R - mean; `leave_one_out`: R - mean of the others.

    Returns:
        float64. All zeros for a group of which fewer than two are graded: there is nothing to compare.

    Source: `std`: GRPO, arXiv 2402.03300, section 4.1.2, with the sample standard deviation (n - 1). `mean`: Dr. GRPO,
    arXiv 2503.20783, section 3.2. `leave_one_out`: RLOO, arXiv 2402.14740, section 3.
    """
    num = graded.sum(-1, keepdim=True).double()
    others = (num - 1).clamp(min=1)
    known = torch.where(graded, rewards.double(), 0.0)
    centred = torch.where(graded, known - known.sum(-1, keepdim=True) / num, 0.0)
    if kind == "std":
        centred /= (centred.square().sum(-1, keepdim=True) / others).sqrt() + EPSILON
    elif kind == "leave_one_out":
        centred *= num / others
    return torch.where(num >= 2, centred, 0.0)


def overlong_penalty(
    num_tokens: Int[Tensor, " group"], max_tokens: int, buffer: int, factor: float
) -> Float[Tensor, " group"]:
    """What each completion's reward loses for its length: 0 up to `max_tokens - buffer`, then linearly up to `factor`.

    Source: DAPO, arXiv 2503.14476, equation 13, whose penalty is -1 at the limit; here `factor` scales it.
    """
    if buffer == 0:
        return torch.zeros(len(num_tokens), dtype=torch.float64)
    return factor * ((num_tokens - (max_tokens - buffer)).double() / buffer).clamp(0, 1)
