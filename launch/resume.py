"""A run that goes on in its directory."""

from pathlib import Path
from typing import NamedTuple

from common.config import Config
from common.errors import ConfigError
from common.layout import RESOLVED, read_resolved
from common.metrics import COMPLETE
from common.resume import check_resume
from launch.report import read_rows
from launch.run_directory import check_free, check_unused


class Earlier(NamedTuple):
    """A run that is in the directory already.

    Attributes:
        config: Its configuration.
        num_steps: Steps that its metrics tell of.
        complete_at: The step that it was complete at; 0 where it never was.
    """

    config: Config
    num_steps: int
    complete_at: int


def find_earlier(config: Config, path: Path) -> Earlier | None:
    """The run that goes on in `path`; None where a new one begins there.

    Raises:
        RunDirectoryError: The directory is in use, holds something else, or a run where `run.resume` is `never`.
    """
    if config.run.resume == "never" or not (path / RESOLVED).is_file():
        check_unused(path)
        return None
    check_free(path)
    rows = read_rows(path)
    num_steps = rows.steps[-1]["step"] if rows.steps else 0
    is_complete = rows.end.get("reason") == COMPLETE
    return Earlier(read_resolved(path), num_steps, rows.end["step"] if is_complete else 0)


def resume_lines(earlier: Earlier, config: Config, path: Path) -> list[str]:
    """What becomes of the earlier run, for people.

    Raises:
        ConfigError: A key has changed that may not, or there are fewer steps than are done.
    """
    changes = check_resume(earlier.config, config, str(path / RESOLVED))
    if config.steps < earlier.num_steps:
        raise ConfigError(
            f"steps: found {config.steps}, expected at least {earlier.num_steps}: so many are done in {path}"
        )
    if is_complete(earlier, config):
        return [f"the run in {path} is complete: all {config.steps} steps are done"]
    done = f"the run in {path} goes on from its newest checkpoint; {earlier.num_steps} steps were done"
    return [done, *(f"changed: {change}" for change in changes)]


def is_complete(earlier: Earlier, config: Config) -> bool:
    """Whether there is nothing left to do."""
    return earlier.complete_at == config.steps
