"""What all tests share: a tiny model that the engine and the learner load, and where the minutes went."""

import asyncio
import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # how fast a busy machine is says nothing of the code
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The page that the tests of faults write their table to."""
    parser.addoption("--reliability", type=Path, help="write what faults cost to the table of this page")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Minutes by folder: of tests, and of what they set up."""
    seconds = Counter[str]()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            seconds["/".join(report.nodeid.split("/")[:2])] += report.duration
    if seconds:
        terminalreporter.section("minutes")
        for folder, total in seconds.most_common():
            terminalreporter.line(f"{total / 60:6.2f}  {folder}")


@pytest.fixture(autouse=True, scope="module")
def nothing_stays_open() -> Iterator[None]:
    """A module leaves no task pending and no socket open, whatever the garbage collector has met by then."""
    before = _open_sockets()
    yield
    gc.collect()
    pending = [found for found in gc.get_objects() if issubclass(type(found), asyncio.Task) and not found.done()]
    assert not pending
    assert not _open_sockets() - before


def _open_sockets() -> set[str]:
    """This process's, by the kernel's names."""
    names: set[str] = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            names.add(str(path.readlink()))
    return {name for name in names if name.startswith("socket:")}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two layers with random weights and a character tokenizer."""
    from tests.models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")
