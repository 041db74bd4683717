"""Policy versions and the staleness between them."""

import re
from typing import Annotated, NamedTuple, Self

from msgspec import Meta

from common.errors import WireError

_Number = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]  # int32 on the wire
_TEXT = re.compile(r"(\d{1,9})\.(\d{1,9})")


class Version(NamedTuple):
    """The version of a policy's weights.

    Attributes:
        lineage: Counts the times the run began or resumed from a checkpoint, from 0.
        number: Counts published weights, from 0, the starting checkpoint.
    """

    lineage: _Number
    number: _Number

    def __str__(self) -> str:
        """The form that the engine carries as its weight version."""
        return f"{self.lineage}.{self.number}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The version that `str` wrote.

        Raises:
            WireError: The text is no version.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise WireError(f"found {text!r}, expected a policy version such as '0.12'")
        return cls(int(match[1]), int(match[2]))

    def next(self) -> Self:
        """The version after one more step in the same lineage."""
        return type(self)(self.lineage, self.number + 1)


class Lineages:
    """The tree of lineages: which one branched from which, and at what number.

    Two different weights never share a version: a resume from the checkpoint of version (l, b) opens a new lineage that
    branches from l at b, and what the crash abandoned of l beyond b stays distinguishable from what is trained anew.
    """

    def __init__(self, branches: tuple[Version | None, ...] = (None,)) -> None:
        """`branches[i]` is the version that lineage i resumed from; None for lineage 0."""
        self.branches = tuple(None if b is None else Version(*b) for b in branches)
        assert self.branches[:1] == (None,)
        assert all(b is not None and b.lineage < i for i, b in enumerate(self.branches) if i > 0)

    def opened_at(self, version: Version) -> "Lineages":
        """These lineages and a new one that resumes from `version`."""
        return Lineages((*self.branches, version))

    @property
    def newest(self) -> int:
        """The number of the newest lineage."""
        return len(self.branches) - 1

    def staleness(self, version: Version, current: Version) -> int:
        """How many updates lie between a token's version and the learner's: the distance in the tree of versions.

        Within a lineage this is v - n, and for a token of an older lineage that branched at b it is (v - b) + |n - b|
        (design, section 1).

        Args:
            version: Of the token.
            current: Of the learner; its lineage descends from the token's, or the token's from one of its ancestors.
        """
        if version.lineage == current.lineage:
            return abs(current.number - version.number)
        ahead = dict(self._ancestry(current))
        for lineage, number in self._ancestry(version):
            if lineage in ahead:
                meet = min(number, ahead[lineage])
                return (current.number - meet) + (version.number - meet)
        raise AssertionError("lineage 0 is an ancestor of every version")

    def _ancestry(self, version: Version) -> list[tuple[int, int]]:
        """Lineages from the version's own to lineage 0, each with the number at which the path leaves it."""
        path, at = [], version
        while True:
            path.append((at.lineage, at.number))
            branch = self.branches[at.lineage]
            if branch is None:
                return path
            at = branch
