"""One tree of errors.

    SluiceError                     exit code 1
    ├── UsageError (ValueError)     what the user gave is wrong; exit code 2
    │   ├── ConfigError             a key or value of the configuration
    │   ├── DataError               a file of prompts
    │   ├── ModelError              a model directory
    │   └── RunDirectoryError       the run directory, its disk, or a port
    │       └── DamageError         a checkpoint that is not what was written
    ├── WireError                   bytes that are no message
    ├── SilenceError                a peer that no longer answers
    ├── DeadlineError               a wait that took too long, with what it waited for
    ├── RefusedError                a peer's refusal, with its reason
    ├── WeightsError                weights that are not what was published
    ├── EngineError                 the engine failed to do what it was asked
    ├── GateError                   generator and learner disagree on logprobs; exit code 4
    └── StallError                  a run that cannot go on, with what it waits for; exit code 3

A process that ends with 2, 3 or 4 is not restarted. Each message is one line: what was found, what was expected, where.
"""

import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress


class SluiceError(Exception):
    """Base of all errors that Sluice raises on purpose."""

    exit_code = 1


class UsageError(SluiceError, ValueError):
    """The user's input is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A key or a value of the configuration is wrong."""


class DataError(UsageError):
    """A file of prompts is wrong."""


class ModelError(UsageError):
    """A model directory is missing, broken, or of an architecture that is not supported."""


class RunDirectoryError(UsageError):
    """The run directory, its disk or a port cannot be used."""


class DamageError(RunDirectoryError):
    """A checkpoint is not what was written."""


class WireError(SluiceError):
    """Bytes from a peer are not a message of this protocol."""


class SilenceError(SluiceError):
    """A peer sent neither an answer nor a sign of life."""


class DeadlineError(SluiceError):
    """A wait took longer than it may."""


class RefusedError(SluiceError):
    """A peer understood the request and refuses it."""


class WeightsError(SluiceError):
    """Weights, or a delta of them, are not what was published."""


class EngineError(SluiceError):
    """The engine failed to do what it was asked."""


class GateError(SluiceError):
    """The logprobs of generator and learner differ by more than the configured limit."""

    exit_code = 4


class StallError(SluiceError):
    """The run cannot go on."""

    exit_code = 3


@contextmanager
def exit_on_error() -> Generator[None]:
    """Turns a SluiceError into one line on stderr and its exit code; every other exception keeps its traceback."""
    try:
        yield
    except SluiceError as error:
        with suppress(OSError):  # where the disk is full, the exit code has to say it alone
            print(f"sluice: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
