"""What a valid configuration means that its owner may not expect: a line each, before anything starts."""

from common.config import Config
from common.shape import ModelShape
from launch.estimate import rank_memory, readable

_WIDE_CLIP = 0.2  # a mean over a whole completion hardly moves as far; the paper's clips are below a thousandth


def notices(config: Config, shape: ModelShape) -> list[str]:
    """Those that apply."""
    loss, sampling = config.loss, config.sampling
    wide = max(loss.clip_low, loss.clip_high)
    sequences = config.groups_per_step * config.group_size
    rows = [
        (
            config.updates_per_step == 1 and loss.proximal == "recompute",
            "updates_per_step = 1: the trust-region ratio is 1 by nature, loss.clip_low and loss.clip_high never bind",
        ),
        (
            wide >= _WIDE_CLIP,
            f"loss.clip_low = {loss.clip_low:g}, loss.clip_high = {loss.clip_high:g}: the ratio is a mean over a whole "
            "completion, which hardly moves as far; watch clip_fraction",
        ),
        (
            loss.kl_coefficient > 0,
            f"loss.kl_coefficient = {loss.kl_coefficient:g}: the reference takes "
            f"{_reference_size(config, shape)} of host memory on each rank, at most, and one more forward pass of "
            f"{sequences:,} sequences a step",
        ),
        (
            sampling.top_p < 1 or sampling.top_k > 0,
            f"sampling.top_p = {sampling.top_p:g}, sampling.top_k = {sampling.top_k}: tokens come from a truncated "
            "distribution, the ratios are those of the whole one",
        ),
        (
            bool(config.model) and not config.data.test,
            "data.test is empty: nothing is evaluated, and [evaluation] has no effect",
        ),
        (
            config.learner.keep_checkpoints == 1,
            "learner.keep_checkpoints = 1: where the newest checkpoint is damaged there is none to fall back to",
        ),
        (loss.shuffle_rewards, "loss.shuffle_rewards = true: a control experiment, nothing can be learned"),
    ]
    return [line for applies, line in rows if applies]


def _reference_size(config: Config, shape: ModelShape) -> str:
    stages = range(config.learner.parallel.pipeline)
    return readable(max(rank_memory(config, shape, stage).reference for stage in stages))
