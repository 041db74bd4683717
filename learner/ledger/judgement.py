"""What is wrong with a scored group, or uniform about it: pure functions."""

from common import wire
from common.config import Config
from common.versions import Version

MIN_GRADED = 2
ALL_RIGHT, ALL_WRONG = "all graded completions are right", "all graded completions are wrong"


def min_completions(config: Config) -> int:
    """The smallest group that is trained."""
    return MIN_GRADED if config.lease.late == "train_rest" else config.group_size


def malformed_reason(
    scored: wire.ScoredGroup, versions: tuple[Version, ...], sizes: tuple[int, int], num_lineages: int
) -> str:
    """Why a scored group, sampled under `versions`, cannot be what was leased; empty where it can.

    `sizes` are the fewest and the most completions that it may have.
    """
    completions, (fewest, most) = scored.group.completions, sizes
    if not fewest <= len(completions) <= most:
        expected = f"{most}" if fewest == most else f"{fewest} to {most}"
        return f"found {len(completions)} completions, expected {expected}"
    if len(scored.grades) != len(completions):
        return f"found {len(scored.grades)} grades for {len(completions)} completions"
    if num_twice := len(completions) - len({completion.seed for completion in completions}):
        return f"found {num_twice} completions with the seed of another, expected one each"
    if any(c.finish_reason is wire.FinishReason.ABORT for c in completions):
        return "found an aborted completion"
    if any(version.lineage >= num_lineages for version in versions):
        return f"found a version of an unknown lineage, expected one of {num_lineages}"
    return ""


def versions_of(group: wire.Group) -> tuple[Version, ...]:
    """The versions that sampled a token of the group, each once, in order."""
    return tuple(sorted({span.version for completion in group.completions for span in completion.spans()}))


def num_graded(grades: tuple[wire.Grade, ...]) -> int:
    """How many completions have a reward."""
    return sum(grade.outcome.graded for grade in grades)


def uniform_reason(grades: tuple[wire.Grade, ...]) -> str:
    """Why a group teaches nothing: its graded completions all have the same correctness. Empty where they do not.

    There are few different reasons, so that visits can be counted by them.
    """
    correct = {grade.correct for grade in grades if grade.outcome.graded}
    if len(correct) != 1:
        return ""
    value = correct.pop()
    return {1.0: ALL_RIGHT, 0.0: ALL_WRONG}.get(value, f"all graded completions have correctness {value:g}")
