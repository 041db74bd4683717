"""What all tests share: a tiny model that the engine and the learner load, and where the minutes went."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from common.rendezvous import RunKeys
from tests.leaks import nothing_left_open

TOGETHER = ("tests/system/", "tests/generator/")  # whole runs, one after the other, and what shares the engine

# How fast a busy machine is says nothing of the code. A failure of `make test` must come from the change, so
# it has the same examples each time; `make test-full` draws new ones.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("new-examples", untimed, derandomize=False)
settings.register_profile("same-examples", untimed, derandomize=True)
settings.load_profile("same-examples")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The page that the tests of faults write their table to."""
    parser.addoption("--reliability", type=Path, help="write what faults cost to the table of this page")


class ByWhatTheyShare(LoadFileScheduling):
    """The tests of a file go to one worker, with what they share; so do those of some folders."""

    def _split_scope(self, nodeid: str) -> str:
        return next((folder for folder in TOGETHER if nodeid.startswith(folder)), super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByWhatTheyShare:
    """Which worker of `-n` runs which tests."""
    return ByWhatTheyShare(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest begin, so that all workers end together."""
    items.sort(key=lambda item: not item.nodeid.startswith(TOGETHER))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Minutes by folder: of tests, and of what they set up."""
    seconds: dict[str, float] = defaultdict(float)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            seconds["/".join(report.nodeid.split("/")[:2])] += report.duration
    if seconds:
        terminalreporter.section("minutes")
        for folder, total in sorted(seconds.items(), key=lambda item: -item[1]):
            terminalreporter.line(f"{total / 60:6.2f}  {folder}")


@pytest.fixture(autouse=True, scope="module")
def module_leaves_nothing_open() -> Iterator[None]:
    """What the garbage collector would complain of in whichever test it runs is found where it comes from."""
    with nothing_left_open():
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two layers with random weights and a character tokenizer."""
    from tests.models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture
def keys(tmp_path: Path) -> RunKeys:
    """Of a run directory that has nothing else."""
    return RunKeys.create(tmp_path)
