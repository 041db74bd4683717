"""Contradictions of the keys that say what is sampled: data, evaluation, lengths."""

from typing import TYPE_CHECKING

from common.learning import LossConfig
from common.sections import SamplingConfig

if TYPE_CHECKING:
    from common.config import Config

Contradictions = list[tuple[bool, str]]
_LOSS = LossConfig()
_SAMPLING = SamplingConfig()


def contradictions_of_data(config: "Config") -> Contradictions:
    """Whether each combination is there, and what to say then."""
    return [*_of_the_data(config), *_of_evaluation(config), *_of_lengths(config)]


def _of_the_data(config: "Config") -> Contradictions:
    train, test = config.data.train_files, config.data.test_files
    return [
        *(
            (
                len(train) == 1 and file.weight != 1,
                f"data.train: {file.path}: found a weight of {file.weight:g} for the only file, where it has no effect",
            )
            for file in train
        ),
        *(
            (
                file.weight != 1,
                f"data.test: {file.path}: found a weight of {file.weight:g}, where it has no effect: each prompt of a "
                "held-out set is sampled",
            )
            for file in test
        ),
    ]


def _of_evaluation(config: "Config") -> Contradictions:
    num_samples, sampling = config.evaluation.num_samples, config.evaluation.sampling
    greedy = sampling.temperature == 0
    return [
        (
            num_samples > 1 and greedy,
            f"evaluation.num_samples: found {num_samples} at evaluation.sampling.temperature = 0, "
            "expected 1: greedy samples are all the same",
        ),
        *(
            (
                greedy and getattr(sampling, key) != getattr(_SAMPLING, key),
                f"evaluation.sampling.{key}: found {getattr(sampling, key):g} at evaluation.sampling.temperature = 0, "
                "where it has no effect",
            )
            for key in ("top_p", "top_k")
        ),
    ]


def _of_lengths(config: "Config") -> Contradictions:
    loss, longest = config.loss, config.data.max_prompt_tokens + config.sampling.max_tokens
    evaluated = config.data.max_prompt_tokens + config.evaluation.sampling.max_tokens
    copies = config.generator.parallel.data
    cached = config.generator.max_total_tokens // copies
    share = "" if copies == 1 else f" // generator.parallel.data = {cached}"
    return [
        (
            longest > config.learner.max_tokens_per_microbatch,
            f"learner.max_tokens_per_microbatch: found {config.learner.max_tokens_per_microbatch}, expected at least "
            f"data.max_prompt_tokens + sampling.max_tokens = {longest}",
        ),
        (
            longest > cached,
            f"generator.max_total_tokens: found {config.generator.max_total_tokens}{share}, expected at least "
            f"data.max_prompt_tokens + sampling.max_tokens = {longest}",
        ),
        (
            evaluated > cached,
            f"generator.max_total_tokens: found {config.generator.max_total_tokens}{share}, expected at least "
            f"data.max_prompt_tokens + evaluation.sampling.max_tokens = {evaluated}",
        ),
        (
            loss.overlong_buffer > config.sampling.max_tokens,
            f"loss.overlong_buffer: found {loss.overlong_buffer}, expected at most sampling.max_tokens = "
            f"{config.sampling.max_tokens}",
        ),
        (
            loss.overlong_buffer == 0 and loss.overlong_factor != _LOSS.overlong_factor,
            f"loss.overlong_factor: found {loss.overlong_factor:g} with loss.overlong_buffer = 0, where it has no "
            "effect",
        ),
    ]
