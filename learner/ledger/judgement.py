"""What is wrong with a scored group, or uniform about it: pure functions."""

import numpy as np

from common import wire
from common.versions import Version


def malformed_reason(scored: wire.ScoredGroup, num_completions: int, num_lineages: int) -> str:
    """Why a scored group cannot be what was leased; empty where it can."""
    completions = scored.group.completions
    if len(completions) != num_completions:
        return f"found {len(completions)} completions, expected {num_completions}"
    if len(scored.grades) != num_completions:
        return f"found {len(scored.grades)} grades for {num_completions} completions"
    if any(c.finish_reason is wire.FinishReason.ABORT for c in completions):
        return "found an aborted completion"
    if any(v.lineage >= num_lineages for v in versions_of(scored.group)):
        return f"found a version of an unknown lineage, expected one of {num_lineages}"
    return ""


def versions_of(group: wire.Group) -> tuple[Version, ...]:
    """The versions that sampled a token of the group, each once, in order."""
    triples = np.concatenate([wire.ints(c.versions).reshape(-1, 3) for c in group.completions])
    return tuple(Version(int(lineage), int(number)) for lineage, number in np.unique(triples[:, 1:], axis=0))


def num_graded(grades: tuple[wire.Grade, ...]) -> int:
    """How many completions have a reward."""
    return sum(grade.outcome.graded for grade in grades)


def uniform_reason(grades: tuple[wire.Grade, ...]) -> str:
    """Why a group teaches nothing: its graded completions all have the same correctness. Empty where they do not."""
    correct = {grade.correct for grade in grades if grade.outcome.graded}
    return (
        f"all {num_graded(grades)} graded completions have correctness {correct.pop():g}" if len(correct) == 1 else ""
    )
