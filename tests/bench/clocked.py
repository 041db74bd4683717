"""A policy that tells where the time of a step goes, and a step's groups for it."""

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common import wire
from common.config import Config
from common.versions import Version
from learner.batch import MicroBatch
from learner.megatron.policy import Policy
from learner.megatron.tokens import shard_tokens
from learner.trainable import BatchShare, Loss, UpdateResult
from tests.groups import completion, grade, training_group
from tests.learner.megatron import tiny

PROMPT_TOKENS = 6


class ClockedPolicy:
    """The real one, with clocks around what it is asked.

    Attributes:
        parts: Processor seconds: `policy` in its calls, `loss` in the loss and measures that they call, `backward` in
            the loss's own backward pass, `indices` in finding each rank's tokens. `twice` is the time of the last two
            and belongs to no step: they are made once more to be timed.
    """

    def __init__(self, config: Config) -> None:
        self.parts: Counter[str] = Counter()
        self._policy = Policy(config)
        self._place, self._device = self._policy._place, self._policy._device

    @property
    def share(self) -> BatchShare:
        """Of the batch."""
        return self._policy.share

    def logprobs(self, micros: Sequence[MicroBatch]) -> list[Tensor]:
        """The policy's."""
        self._index(micros)
        began = time.process_time()
        found = self._policy.logprobs(micros)
        self.parts["policy"] += time.process_time() - began
        return found

    def reference_logprobs(self, micros: Sequence[MicroBatch]) -> list[Tensor]:
        """The policy's."""
        return self._policy.reference_logprobs(micros)

    def update(self, micros: Sequence[MicroBatch], loss: Loss) -> UpdateResult:
        """The policy's, with the loss clocked."""

        def clocked(micro: MicroBatch, learner: Tensor, entropy: Tensor) -> Tensor:
            began = time.process_time()
            value = loss(micro, learner, entropy)
            between = time.process_time()
            torch.autograd.grad(value, learner, retain_graph=True)
            ended = time.process_time()
            self.parts["loss"] += between - began
            self.parts["backward"] += ended - between
            self.parts["twice"] += ended - between
            return value

        self._index(micros)
        before, began = self.parts["twice"], time.process_time()
        result = self._policy.update(micros, clocked)
        self.parts["policy"] += time.process_time() - began - (self.parts["twice"] - before)
        return result

    def of_a_step(self, whole: float) -> dict[str, float]:
        """The parts of a step that are not Megatron's; what is in no call of the policy is batches and metrics."""
        own = {"batches and metrics": whole - self.parts["policy"], "loss and measures": self.parts["loss"]}
        return own | {"the loss's backward pass": self.parts["backward"], "indices": self.parts["indices"]}

    def _index(self, micros: Sequence[MicroBatch]) -> None:
        began = time.process_time()
        for micro in micros:
            shard_tokens(micro, self._place, self._device)
        seconds = time.process_time() - began
        self.parts["indices"] += seconds
        self.parts["twice"] += seconds


def groups(number: int, config: Config) -> tuple[tuple[wire.TrainingGroup, ...], Version]:
    """A step's groups of the built-in task's lengths, one version stale, and the learner's version."""
    rng = np.random.default_rng(number)
    version = Version(0, number + 1)
    return tuple(_group(rng, i, config.group_size, Version(0, number)) for i in range(config.groups_per_step)), version


def _group(rng: np.random.Generator, visit: int, size: int, version: Version) -> wire.TrainingGroup:
    completions: list[wire.Completion] = []
    for seed in range(size):
        tokens = rng.integers(1, tiny.VOCAB, rng.integers(2, 5), dtype=np.int32)
        completions.append(completion(tokens, -4 * rng.random(len(tokens), dtype=np.float32), version, seed=seed))
    grades = [grade(float(rng.random() < 0.5)) for _ in completions]
    return training_group(rng.integers(1, tiny.VOCAB, PROMPT_TOKENS), completions, grades, visit=visit)
