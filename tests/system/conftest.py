"""Whole runs: the launcher as a user starts it, with all its real parts.

When a test fails, its report has the last lines of every process of its runs, and what each run waited for.
"""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from common import wire
from common.layout import read_resolved
from common.metrics import read_metrics, read_rows
from common.transport import ledger_client
from tests.system.accounts import Cost, assert_curve_is_unbroken, cost, recovery_s
from tests.system.reliability import Table

REPOSITORY = Path(__file__).resolve().parents[2]
HANG_S = 1800  # against a hang: the longest run of a test takes five minutes on two idle cores
LAST_LINES = 20
CHILD = str(REPOSITORY / "launch" / "child.py")
ENDLESS = ("steps=1000", "groups_per_step=8", "evaluation.every=1000")  # until a test has seen enough: small, long
STATES = {"waiting", "leased", "scored", "reserved", "trained", "filtered", "rejected", "quarantined", "unused"}


class Run:
    """A run of `launch/cluster.py`, under way or ended."""

    def __init__(
        self,
        directory: Path,
        layout: str,
        overrides: tuple[str, ...],
        output: Path,
        *,
        prefix: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        """`prefix` is a command that runs another, such as `ip netns exec NAME`."""
        self.directory = directory
        self.memory = Path("/dev/shm") / f"run-{hashlib.blake2s(str(directory).encode(), digest_size=6).hexdigest()}"
        self.memory.mkdir(exist_ok=True)  # a run that goes on has the place of the one before
        self._output = output.open("w+")
        patient = (f"run.stop_timeout_s={HANG_S}", f"run.stall_timeout_s={HANG_S}")  # of a busy machine
        own = (f"run.dir={directory}", f"weights.dir={self.memory}", *patient)
        command = [*prefix, sys.executable, "launch/cluster.py", "--layout", layout, *own, *overrides]
        self.launcher = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | (environment or {}),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> int:
        """The launcher's exit code."""
        return self.launcher.wait(HANG_S)

    def output(self) -> str:
        """What a person saw."""
        return Path(self._output.name).read_text()

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl of one kind."""
        return [row for row, _ in read_metrics(self.directory) if row["kind"] == kind]

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return json.loads((self.directory / "summary.json").read_text())

    def accuracies(self) -> dict[int, float]:
        """Held-out accuracy by step."""
        return {row["step"]: row["accuracy"] for row in self.rows("evaluation")}

    def processes(self, *words: str) -> list[psutil.Process]:
        """Living processes of this run whose command line has all the words."""
        wanted = {str(self.directory), *words}
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = process.info["cmdline"] or []
            if wanted <= set(line) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def events(self, process: str, event: str) -> list[dict[str, Any]]:
        """The events of one name in the log of a process."""
        path = self.directory / "logs" / f"{process}.jsonl"
        return [entry for entry, _ in read_rows(path) if entry["event"] == event]

    def status(self) -> wire.StatusReport:
        """How the run stands now, by its ledger."""

        async def ask() -> wire.StatusReport:
            async with ledger_client(self.directory) as client:
                return await client.ask(wire.Status(), wire.StatusReport, deadline_s=HANG_S)

        return asyncio.run(ask())

    def was_lost(self, member: str) -> bool:
        """Whether the ledger has given up a process that fell silent."""
        return any(event["member"] == member for event in self.events("ledger", "member_lost"))

    def num_joins(self, member: str) -> int:
        """How often a process has said hello."""
        return sum(event["member"] == member for event in self.events("ledger", "member_joined"))

    def kill(self, module: str, *words: str) -> float:
        """SIGKILL to the processes of a role, as the kernel's memory killer would; returns when."""
        return self._signal(self._of_role(module, *words), signal.SIGKILL)

    def stop(self, module: str, *words: str) -> float:
        """SIGSTOP to the processes of a role and to all that they started, as in a debugger; returns when."""
        return self._signal(self._with_children(module, *words), signal.SIGSTOP)

    def stop_workers(self, module: str, *words: str) -> float:
        """SIGSTOP to what the processes of a role started, and not to themselves; returns when."""
        return self._signal(self._children(module, *words), signal.SIGSTOP)

    def go_on(self, module: str, *words: str) -> float:
        """SIGCONT to those; returns when."""
        return self._signal(self._with_children(module, *words), signal.SIGCONT)

    def kill_launcher(self) -> float:
        """SIGKILL to the launcher alone; returns when."""
        now = time.time()
        self.launcher.kill()
        self.wait()
        return now

    def _of_role(self, module: str, *words: str) -> list[psutil.Process]:
        found = [p for p in self.processes("-m", module, *words) if CHILD not in p.cmdline()]
        assert found, f"no process of {module} is alive"
        return found

    def _children(self, module: str, *words: str) -> list[psutil.Process]:
        return [child for parent in self._of_role(module, *words) for child in parent.children(recursive=True)]

    def _with_children(self, module: str, *words: str) -> list[psutil.Process]:
        return [*self._of_role(module, *words), *self._children(module, *words)]

    def _signal(self, processes: list[psutil.Process], number: signal.Signals) -> float:
        now = time.time()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return now

    def wait_for_step(self, step: int, *, lineage: int = 0) -> None:
        """Waits until a step is done, in a lineage or a later one."""

        def is_done() -> bool:
            return any(row["step"] >= step and row["lineage"] >= lineage for row in self.rows("step"))

        self.wait_until(is_done, f"step {step} of lineage {lineage}")

    def wait_for_recovery(self, fault_at: float) -> None:
        """Waits until a step has trained a group leased after a fault, and for three more."""
        self.wait_until(lambda: recovery_s(self.directory, fault_at) is not None, "a group leased after the fault")
        self.wait_for_steps(3)

    def wait_for_steps(self, num_steps: int) -> None:
        """Waits until so many more steps are done."""
        self.wait_for_step(num_steps + self.rows("step")[-1]["step"])

    def wait_until(self, holds: Callable[[], object], what: str) -> None:
        """Waits for something to come about while the run goes on."""
        until = time.monotonic() + HANG_S
        while not holds():
            assert self.launcher.poll() is None, f"the run ended while the test waited for {what}"
            assert time.monotonic() < until, f"waited {HANG_S} s for {what}"
            time.sleep(0.1)

    def audit(self) -> subprocess.CompletedProcess[str]:
        """`python -m learner.ledger --audit RUN`."""
        command = [sys.executable, "-m", "learner.ledger", "--audit", str(self.directory)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG_S, check=False)

    def model(self) -> Path:
        """The directory of its model."""
        return Path(read_resolved(self.directory).model)

    def assert_sound(self) -> None:
        """The accounts hold, the promise was kept, and nothing is left behind."""
        audit = self.audit()
        assert audit.returncode == 0, audit.stdout
        summary = self.summary()
        config = read_resolved(self.directory)
        assert set(summary["groups"]) == STATES
        assert summary["groups"]["trained"] == summary["steps"] * config.groups_per_step
        assert summary["staleness_max"] <= config.max_staleness
        self.assert_nothing_is_left()

    def assert_survived(self, fault_at: float | None) -> Cost:
        """The run went on to its end after a fault: sound, its curve unbroken and no lower; returns what it cost."""
        self.assert_sound()
        assert_curve_is_unbroken(self.directory)
        return cost(self.directory, fault_at)

    def finish(self) -> None:
        """Ctrl-C: the run has shown what it was started for, and ends with a checkpoint of its last step."""
        os.killpg(self.launcher.pid, signal.SIGINT)
        assert self.wait() == 130
        summary = self.summary()
        assert summary["checkpoint"].endswith(f"step-{summary['steps']:06d}/huggingface")
        assert Path(summary["checkpoint"]).is_dir()

    def assert_nothing_is_left(self) -> None:
        """No process of the run lives, and nothing of it is in memory-backed storage."""
        until = time.monotonic() + HANG_S  # the kernel may take its time
        while (alive := self.processes()) and time.monotonic() < until:
            time.sleep(0.2)
        assert not alive, [p.cmdline() for p in alive]
        assert list(self.memory.iterdir()) == []

    def last_words(self) -> str:
        """The last lines of what a person saw and of each process's log, and what the ledger's file says."""
        told = {"terminal": self.output()}
        for path in sorted((self.directory / "logs").glob("*")):
            try:
                told[path.name] = path.read_text(errors="replace")
            except OSError as error:
                told[path.name] = str(error)
        try:
            audit = self.audit()
            told["audit"] = audit.stdout + audit.stderr
        except subprocess.SubprocessError as error:
            told["audit"] = str(error)
        return "\n".join(f"{name}:\n{_last_lines(text)}" for name, text in told.items() if text)

    def close(self) -> None:
        """Ends what a failed test left."""
        if self.launcher.poll() is None:
            os.killpg(self.launcher.pid, signal.SIGKILL)
            self.wait()
            psutil.wait_procs(self.processes(), timeout=30)  # each takes with it what it started, whatever its name
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.memory, ignore_errors=True)
        self._output.close()


def _last_lines(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()[-LAST_LINES:])


_RUNS = pytest.StashKey[list[Run]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds to the report of a failed test what the processes of its runs said last."""
    report = yield
    if report.failed:
        report.sections += [(f"{run.directory}", run.last_words()) for run in item.stash.get(_RUNS, [])]
    return report


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """The rows of docs/reliability.md, written to the page of `--reliability` when all tests have run."""
    table = Table()
    yield table
    if page := request.config.getoption("--reliability"):
        table.write(page)


@pytest.fixture
def report(request: pytest.FixtureRequest, table: Table) -> Callable[[str, str, Cost], None]:
    """Checks that a fault cost no group, and takes down the fault, what is promised, and what was seen."""

    def take_down(fault: str, promise: str, seen: Cost) -> None:
        assert seen.num_lost == 0
        assert seen.num_doubled == 0
        table.add(fault, promise, seen, f"`{request.path.name}`: {request.node.name.removeprefix('test_')}")

    return take_down


@pytest.fixture
def start_run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs, and ends what is left of them."""
    runs = request.node.stash.setdefault(_RUNS, [])

    def start(*overrides: str, name: str = "run", layout: str = "local", **options: Any) -> Run:
        output = tmp_path / f"{name.replace('/', '-')}-{len(runs)}.out"
        runs.append(Run(tmp_path / name, layout, overrides, output, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.close()
