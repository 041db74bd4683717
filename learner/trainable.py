"""What a step needs of a policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from learner.batch import MicroBatch

Loss = Callable[[MicroBatch, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class UpdateResult:
    """What an update was.

    Attributes:
        grad_norm: Before clipping.
        skipped: Whether the norm was no finite number, so that nothing changed.
        lr: Learning rate.
    """

    grad_norm: float
    skipped: bool
    lr: float


class Trainable(Protocol):
    """A policy that learns: `learner.megatron.policy.Policy`, or a test's reference."""

    def logprobs(self, micro: MicroBatch) -> Float[Tensor, " tokens"]:
        """Logprobs of the tokens, without gradient."""
        ...

    def reference_logprobs(self, micros: Sequence[MicroBatch]) -> list[Float[Tensor, " tokens"]]:
        """Logprobs of the tokens of each micro-batch under the frozen reference, where there is one."""
        ...

    def update(self, micros: Sequence[MicroBatch], loss: Loss) -> UpdateResult:
        """One optimizer update on the sum of the losses."""
        ...
