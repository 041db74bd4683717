"""Contradictions of the keys that say what is kept of a run, and whether it goes on."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.config import Config


def contradictions_of_checkpoints(config: "Config") -> list[tuple[bool, str]]:
    """Whether each combination is there, and what to say then."""
    learner, run = config.learner, config.run
    return [
        (
            learner.keep_every % learner.checkpoint_every != 0,
            f"learner.keep_every: found {learner.keep_every}, expected 0 or a multiple of learner.checkpoint_every = "
            f"{learner.checkpoint_every}",
        ),
        (
            run.resume == "auto" and not run.dir and "%" in run.name,
            f"run.resume: found 'auto' with run.name = {run.name!r}, where it has no effect: expected run.dir or a "
            "name without the time",
        ),
    ]
