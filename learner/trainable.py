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
        optimizer_s: What of the update's time was not forward and backward passes.
    """

    grad_norm: float
    skipped: bool
    lr: float
    optimizer_s: float = 0.0


@dataclass(frozen=True)
class BatchShare:
    """Which micro-batches a rank works on.

    Attributes:
        rank: Of those that share the sequences.
        num_ranks: They are as many.
        multiple: The number of a rank's micro-batches is one of it.
        speaks: Whether what this rank measures counts, of all that work on the same micro-batches.
    """

    rank: int = 0
    num_ranks: int = 1
    multiple: int = 1
    speaks: bool = True


class Trainable(Protocol):
    """A policy that learns: `learner.megatron.policy.Policy`, or a test's reference."""

    @property
    def share(self) -> BatchShare:
        """This rank's share of the batch."""
        ...

    def logprobs(self, micros: Sequence[MicroBatch]) -> list[Float[Tensor, " tokens"]]:
        """Logprobs of the tokens, without gradient; empty on a rank that has none."""
        ...

    def reference_logprobs(self, micros: Sequence[MicroBatch]) -> list[Float[Tensor, " tokens"]]:
        """Logprobs of the tokens of each micro-batch under the frozen reference, where there is one."""
        ...

    def update(self, micros: Sequence[MicroBatch], loss: Loss) -> UpdateResult:
        """One optimizer update on the sum of the losses."""
        ...
