"""What the updates of a step did, in a form that adds up over micro-batches, updates and ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Self

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learner.batch import MicroBatch
from learner.gspo import LossStats

STALENESS_EDGES = (1, 2, 4, 8, 16)
STALENESS_BUCKETS = ("0", "1", "2_3", "4_7", "8_15", "16_up")
LENGTH_BUCKETS = ("q1", "q2", "q3", "q4")
_COLUMNS = (
    *("length", "staleness", "log_ratio", "log_staleness_ratio", "weight"),
    *("low", "high", "staleness_clipped", "noise"),
)
_TOTALS = ("loss", "kl", "tokens", "response_tokens", "entropy", "difference", "k3")
_SMALLEST, _LARGEST, _NUM_BINS = -8.0, 2.0, 2048  # decades of a logprob difference; a bin is 1.1 % wide


@dataclass(frozen=True)
class Measures:
    """Sums and columns over the completions that the loss counted.

    Attributes:
        completions: A row for each, Float[S, columns], float64, in the order of `_COLUMNS`.
        totals: Float[totals], float64, in the order of `_TOTALS`.
        differences: How many response tokens have a |learner - generator| in each bin, Int[bins], bins of equal ratio.
    """

    completions: Float[Tensor, "completions columns"]
    totals: Float[Tensor, " totals"]
    differences: Int[Tensor, " bins"]

    @classmethod
    def none(cls) -> Self:
        """Of no completions."""
        rows = torch.zeros(0, len(_COLUMNS), dtype=torch.float64)
        return cls(rows, torch.zeros(len(_TOTALS), dtype=torch.float64), torch.zeros(_NUM_BINS, dtype=torch.long))

    def __add__(self, other: Self) -> "Measures":
        rows = torch.cat([self.completions, other.completions])
        return Measures(rows, self.totals + other.totals, self.differences + other.differences)

    def to_bytes(self) -> bytes:
        """For another rank."""
        return msgspec.msgpack.encode([t.numpy().tobytes() for t in (self.completions, self.totals, self.differences)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` wrote."""
        rows, totals, differences = (bytearray(part) for part in msgspec.msgpack.decode(data, type=list[bytes]))
        completions = np.frombuffer(rows, np.float64).reshape(-1, len(_COLUMNS))
        counts = torch.from_numpy(np.frombuffer(differences, np.int64))
        return cls(torch.from_numpy(completions), torch.from_numpy(np.frombuffer(totals, np.float64)), counts)

    def column(self, name: str) -> Float[Tensor, " completions"]:
        """One number of each completion."""
        return self.completions[:, _COLUMNS.index(name)]

    def total(self, name: str) -> float:
        """One sum."""
        return float(self.totals[_TOTALS.index(name)])


def measure(
    micro: MicroBatch,
    stats: LossStats,
    loss: float,
    kl: float,
    learner_logprobs: Float[Tensor, " tokens"],
    entropy: Float[Tensor, " tokens"],
    noise: Bool[Tensor, " sequences"] | None,
) -> Measures:
    """What one micro-batch adds.

    Args:
        micro: Its completions; those that the loss does not count are left out.
        stats: What the loss did with them.
        loss: The sum over its completions, not divided by N.
        kl: The same of their divergences from the reference, NaN where there is none.
        learner_logprobs: Detached.
        entropy: Of each token's distribution.
        noise: Where the ratio is outside the trust region although no update of the step was made; None where one was,
            or where nothing tells.
    """
    counted = micro.loss_mask
    unknown = torch.full(counted.shape, torch.nan, dtype=torch.float64)
    columns = (
        *(micro.response_lengths, micro.staleness, stats.log_ratio, stats.log_staleness_ratio, stats.weight),
        *(stats.clipped_low, stats.clipped_high, stats.staleness_clipped),
        unknown if noise is None else noise,
    )
    tokens = micro.response_mask & counted[micro.sequence_of_token]
    difference = (learner_logprobs.double() - micro.generator_logprobs.double())[tokens]
    totals = (
        *(loss, kl, float(micro.lengths[counted].sum()), float(tokens.sum()), float(entropy[tokens].double().sum())),
        *(float(difference.abs().sum()), float((difference.expm1() - difference).sum())),
    )
    return Measures(
        torch.stack([column[counted].double() for column in columns], dim=1),
        torch.tensor(totals, dtype=torch.float64),
        _histogram(difference),
    )


def add_up(parts: list[Measures]) -> Measures:
    """The sum."""
    return reduce(Measures.__add__, parts, Measures.none())


def summarize(measures: Measures, max_tokens: int, kl_coefficient: float) -> dict[str, float]:
    """The metrics of a step; NaN where there is nothing to tell it from.

    Args:
        measures: Of all its updates, on all ranks.
        max_tokens: Longest response, whose quarters are the buckets of length.
        kl_coefficient: Of the divergence from the reference in the loss.
    """
    num, num_tokens = len(measures.completions), measures.total("response_tokens")
    weight, rho = measures.column("weight"), measures.column("log_staleness_ratio").exp()
    low, high = measures.column("low"), measures.column("high")
    taught, noise = weight[weight > 0], measures.column("noise")
    shares = {"clip_fraction": low + high, "staleness_clip_fraction": measures.column("staleness_clipped")}
    return {
        "num_tokens": measures.total("tokens"),
        "loss": _ratio(measures.total("loss"), num),
        "kl": _ratio(measures.total("kl"), num),
        "kl_loss": kl_coefficient * _ratio(measures.total("kl"), num),
        "clip_fraction_low": _mean(low),
        "clip_fraction_high": _mean(high),
        **{name: _mean(values) for name, values in shares.items()},
        "noise_floor": _mean(noise[~noise.isnan()]),
        **_by_bucket(measures, shares, max_tokens),
        "ratio_mean": _mean(measures.column("log_ratio").exp()),
        "weight_mean": _mean(weight),
        "weight_min": _extreme(taught, torch.min),
        "weight_max": _extreme(taught, torch.max),
        "staleness_ratio_min": _extreme(rho, torch.min),
        "staleness_ratio_max": _extreme(rho, torch.max),
        "effective_sample_share": _ratio(float(weight.sum() ** 2), num * float(weight.square().sum())),
        "entropy": _ratio(measures.total("entropy"), num_tokens),
        "logprob_difference_mean": _ratio(measures.total("difference"), num_tokens),
        "logprob_difference_p99": _quantile(measures.differences, 0.99),
        "logprob_difference_k3": _ratio(measures.total("k3"), num_tokens),
    }


def _by_bucket(measures: Measures, shares: dict[str, Tensor], max_tokens: int) -> dict[str, float]:
    """Each share among the completions of a staleness, and among those of a quarter of the longest response."""
    edges = torch.tensor(STALENESS_EDGES, dtype=torch.float64)
    age = torch.bucketize(measures.column("staleness").contiguous(), edges, right=True)
    quarter = ((measures.column("length") - 1) * len(LENGTH_BUCKETS) / max_tokens).long().clamp(0, 3)
    names = [*(f"staleness_{name}" for name in STALENESS_BUCKETS), *(f"length_{name}" for name in LENGTH_BUCKETS)]
    of_age = age == torch.arange(len(STALENESS_BUCKETS))[:, None]
    of_length = quarter == torch.arange(len(LENGTH_BUCKETS))[:, None]
    chosen = torch.cat([of_age, of_length]).double()
    means = torch.stack(list(shares.values())) @ chosen.t() / chosen.sum(1)
    return {
        f"{share}_at_{name}": mean
        for share, row in zip(shares, means.tolist(), strict=True)
        for name, mean in zip(names, row, strict=True)
    }


def _histogram(differences: Float[Tensor, " tokens"]) -> Int[Tensor, " bins"]:
    decades = differences.abs().nan_to_num(nan=10**_LARGEST).clamp(min=10**_SMALLEST).log10()
    bins = ((decades - _SMALLEST) * _NUM_BINS / (_LARGEST - _SMALLEST)).clamp(0, _NUM_BINS - 1).long()
    return torch.bincount(bins, minlength=_NUM_BINS)


def _quantile(histogram: Int[Tensor, " bins"], share: float) -> float:
    """To the middle of its bin; 0 where it is smaller than all bins."""
    if not histogram.any():
        return float("nan")
    upto = histogram.cumsum(0)
    i = int(torch.searchsorted(upto, share * float(upto[-1])))
    return 10 ** (_SMALLEST + (i + 0.5) * (_LARGEST - _SMALLEST) / _NUM_BINS) if i else 0.0


def _mean(values: Float[Tensor, " some"] | Bool[Tensor, " some"]) -> float:
    return float(values.double().mean())


def _extreme(values: Tensor, extreme: Callable[[Tensor], Tensor]) -> float:
    return float(extreme(values)) if len(values) else float("nan")


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")
