"""What a run is made of, read from a layout and overrides (common/layout.py) and checked before anything starts."""

from typing import Annotated

from msgspec import Meta

from common.errors import ConfigError
from common.sections import (
    Count,
    DataConfig,
    EvaluationConfig,
    GeneratorConfig,
    LearnerConfig,
    LeaseConfig,
    LossConfig,
    Natural,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    Section,
    VerifierConfig,
    WeightsConfig,
)


class Config(Section):
    """A run.

    Attributes:
        model: Directory of a Hugging Face checkpoint; empty with empty `data.train` trains the tiny built-in task.
        seed: Of every random choice.
        steps: Steps of the run.
        group_size: Completions of a prompt.
        groups_per_step: Groups of a step.
        updates_per_step: Optimizer updates of a step.
        max_staleness: eta: no trained token is older. 0 is the synchronous algorithm.
    """

    model: str = ""
    seed: Natural = 0
    steps: Count = 100
    group_size: Annotated[int, Meta(ge=2)] = 16
    groups_per_step: Count = 16
    updates_per_step: Count = 4
    max_staleness: Natural = 4
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    generator: GeneratorConfig = GeneratorConfig()
    verifier: VerifierConfig = VerifierConfig()
    lease: LeaseConfig = LeaseConfig()
    weights: WeightsConfig = WeightsConfig()

    def check(self) -> None:
        """Checks what concerns several keys.

        Raises:
            ConfigError: Keys contradict each other, or one has no effect.
        """
        for wrong, message in _contradictions(self):
            if wrong:
                raise ConfigError(message)


def _contradictions(config: Config) -> list[tuple[bool, str]]:
    loss, steps = config.loss, config.updates_per_step
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    return [
        (
            config.groups_per_step % steps != 0,
            f"updates_per_step: found {steps}, expected a divisor of groups_per_step = {config.groups_per_step}",
        ),
        (
            bool(config.model) != bool(config.data.train),
            f"model and data.train: found {config.model!r} and {config.data.train!r}, expected both or neither",
        ),
        (
            bool(config.data.test) and not config.data.train,
            f"data.test: found {config.data.test!r} without data.train, expected both",
        ),
        (
            config.sampling.temperature == 0,
            "sampling.temperature: found 0, expected more: a greedy group is uniform and teaches nothing",
        ),
        (
            config.evaluation.num_samples > 1 and config.evaluation.sampling.temperature == 0,
            f"evaluation.num_samples: found {config.evaluation.num_samples} at evaluation.sampling.temperature = 0, "
            "expected 1: greedy samples are all the same",
        ),
        (
            loss.proximal != "recompute" and steps == 1 and config.max_staleness == 0,
            f"loss.proximal: found {loss.proximal!r} with updates_per_step = 1 and max_staleness = 0, expected "
            "'recompute': no ratio differs from 1 there",
        ),
        (
            loss.proximal == "generator" and loss.weight_cap != LossConfig().weight_cap,
            f"loss.weight_cap: found {loss.weight_cap:g} with loss.proximal = 'generator', where it has no effect",
        ),
        (
            loss.narrowing > 0 and config.max_staleness == 0,
            f"loss.narrowing: found {loss.narrowing:g} with max_staleness = 0, where it has no effect",
        ),
        (
            config.learner.dtype == "bfloat16" and config.generator.dtype == "float32",
            "generator.dtype: found 'float32' with learner.dtype = 'bfloat16', expected 'bfloat16': the gate compares "
            "their logprobs",
        ),
        (
            loss.narrowing == 0 and loss.narrowing_floor != LossConfig().narrowing_floor,
            f"loss.narrowing_floor: found {loss.narrowing_floor:g} with loss.narrowing = 0, where it has no effect",
        ),
        (
            config.optimizer.warmup_steps > config.steps,
            f"optimizer.warmup_steps: found {config.optimizer.warmup_steps}, expected at most steps = {config.steps}",
        ),
        (
            longest > config.learner.max_tokens_per_microbatch,
            f"learner.max_tokens_per_microbatch: found {config.learner.max_tokens_per_microbatch}, expected at least "
            f"data.max_prompt_tokens + sampling.max_tokens = {longest}",
        ),
        (
            longest > config.generator.max_total_tokens,
            f"generator.max_total_tokens: found {config.generator.max_total_tokens}, expected at least "
            f"data.max_prompt_tokens + sampling.max_tokens = {longest}",
        ),
    ]
