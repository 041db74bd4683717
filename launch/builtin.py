"""The tiny model and task that a run trains where the configuration names no model: built once, kept in the cache."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from common.config import Config
from common.errors import RunDirectoryError
from common.sections import DataFile, TinyConfig
from launch.plan import REPOSITORY, tiny_command
from launch.processes import run_foreground

CACHE = REPOSITORY / ".cache" / "sluice"
_NAME = "addition"


def tiny_directory(config: Config, cache: Path = CACHE) -> Path:
    """Where the build of this source, the seed and the number of experts is, or will be."""
    source = b"".join((REPOSITORY / "launch" / name).read_bytes() for name in ("tiny.py", "tiny_sizes.py"))
    arguments = f"{config.seed} {config.tiny.num_experts}"
    return cache / f"tiny-{hashlib.sha256(source + arguments.encode()).hexdigest()[:12]}"


def with_tiny_task(config: Config, directory: Path) -> Config:
    """The configuration with the tiny model and its prompts filled in."""
    replace = msgspec.structs.replace
    train, test = (
        (DataFile(path=str(directory / f"{split}.jsonl"), name=_NAME, reward="exact"),) for split in ("train", "test")
    )
    data = replace(config.data, train=train, test=test)
    return replace(config, model=str(directory / "model"), data=data, tiny=TinyConfig())


def build_once(directory: Path, config: Config, notice: Callable[[str], None]) -> None:
    """Builds what `directory` should hold, unless it is there; whole or not at all.

    Raises:
        ProcessError: The build failed.
        RunDirectoryError: The cache cannot be written.
    """
    if directory.is_dir():
        return
    notice("building the tiny model and its task: once, about a minute")
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        notice(run_foreground(tiny_command(temporary, config.seed, config.tiny.num_experts)))
        temporary.rename(directory)
    except OSError as error:
        if not directory.is_dir():  # another launcher may have been faster
            raise RunDirectoryError(f"{directory}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
