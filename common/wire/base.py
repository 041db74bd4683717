"""What all messages are made of."""

from enum import StrEnum
from typing import NamedTuple, dataclass_transform

import msgspec


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Base of everything that travels."""


class Role(StrEnum):
    """What a process is."""

    LEDGER = "ledger"
    LEARNER = "learner"
    GENERATOR = "generator"
    VERIFIER = "verifier"
    LAUNCHER = "launcher"


class LeaseKey(NamedTuple):
    """One attempt at one prompt visit: what fences a late result.

    An evaluation visit has a negative number; it is outside the training accounts.
    """

    visit: int
    attempt: int

    @property
    def is_evaluation(self) -> bool:
        """Whether this lease is of the evaluation kind."""
        return self.visit < 0
