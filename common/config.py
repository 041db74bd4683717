"""What a run is made of, read from a layout and overrides (common/layout.py) and checked before anything starts."""

from typing import Annotated

from msgspec import Meta

from common.contradictions import contradictions
from common.errors import ConfigError
from common.hardware import PlacementConfig
from common.learning import LearnerConfig, LossConfig, OptimizerConfig
from common.sections import (
    Count,
    DataConfig,
    EvaluationConfig,
    GeneratorConfig,
    LeaseConfig,
    Natural,
    RunConfig,
    SamplingConfig,
    Section,
    TinyConfig,
    VerifierConfig,
    WeightsConfig,
)


class Config(Section):
    """A run.

    Attributes:
        model: Directory of a Hugging Face checkpoint; empty with empty `data.train` trains the tiny built-in task.
        made_for: Name of the public model that the layout is made for; then there is no built-in task, and a dry run
            without `model` takes the sizes of launch/models/.
        seed: Of every random choice.
        steps: Steps of the run.
        group_size: Completions of a prompt.
        groups_per_step: Groups of a step.
        updates_per_step: Optimizer updates of a step.
        max_staleness: eta: no trained token is older. 0 is the synchronous algorithm.
    """

    model: str = ""
    made_for: str = ""
    seed: Natural = 0
    steps: Count = 100
    group_size: Annotated[int, Meta(ge=2)] = 16
    groups_per_step: Count = 16
    updates_per_step: Count = 4
    max_staleness: Natural = 4
    run: RunConfig = RunConfig()
    tiny: TinyConfig = TinyConfig()
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
    placement: PlacementConfig = PlacementConfig()

    def check(self) -> None:
        """Checks what concerns several keys.

        Raises:
            ConfigError: Keys contradict each other, or one has no effect.
        """
        for wrong, message in contradictions(self):
            if wrong:
                raise ConfigError(message)
