"""What all messages are made of."""

from enum import StrEnum
from typing import Annotated, NamedTuple, dataclass_transform

import msgspec
from msgspec import Meta

MAX_TEXT = 1 << 20

Natural = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]  # what a float and SQLite hold exactly
Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Small = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
VisitNumber = Annotated[int, Meta(ge=-(1 << 53) + 1, le=(1 << 53) - 1)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]  # no NaN is at least anything
Duration = Annotated[float, Meta(ge=0, le=1e300)]
Share = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[str, Meta(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
Line = Annotated[str, Meta(max_length=1024, pattern=r"^[^\x00-\x1f\x7f]*\Z")]  # a name, or empty
Text = Annotated[str, Meta(max_length=MAX_TEXT)]


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

    visit: VisitNumber
    attempt: Small

    @property
    def is_evaluation(self) -> bool:
        """Whether this lease is of the evaluation kind."""
        return self.visit < 0
