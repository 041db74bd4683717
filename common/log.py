"""Structured logs: JSON lines in the run directory, and a readable form on a terminal."""

import logging
import sys
from pathlib import Path
from typing import TextIO, cast

import structlog

from common.files import Lines

LEARNER = "learner-0"  # the first rank's name
KERNELS = "kernels"  # its event that tells people what the model is made of
DAMAGED = "checkpoint_damaged"  # and the one that tells them of a checkpoint that it cannot go on from
AFRESH = "begins_afresh"  # and of a run that goes on without a checkpoint


def start_logging(role: str, run_dir: Path | None, *, name: str = "", terminal: bool = False) -> None:
    """Binds the role to every event and sends events to `RUN/logs/NAME.jsonl`, or to stderr.

    Args:
        role: The process's role.
        run_dir: The run directory; None logs to stderr only.
        name: Of the process, such as `generator-0`; the role where empty.
        terminal: Whether people read it: no JSON, and to stderr.
    """
    stream: TextIO = sys.stderr
    if run_dir is not None and not terminal:
        path = run_dir / "logs" / f"{name or role}.jsonl"
        stream = cast(TextIO, Lines(path))  # structlog writes and flushes, no more
    renderer = structlog.dev.ConsoleRenderer(colors=False) if terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.dict_tracebacks if not terminal else structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(stream),
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(role=role, process=name or role)


def logger() -> structlog.typing.FilteringBoundLogger:
    """The process's logger: an event name and key-values."""
    return structlog.get_logger()


def bind(**values: object) -> None:
    """Adds key-values, such as the policy version, to every later event of this task and process."""
    structlog.contextvars.bind_contextvars(**values)
