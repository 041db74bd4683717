"""Whole runs: the launcher as a user starts it, with all its real parts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.layout import read_resolved
from common.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
STATES = {"waiting", "leased", "scored", "reserved", "trained", "filtered", "rejected", "quarantined", "unused"}


class Run:
    """A run of `launch/cluster.py`, under way or ended."""

    def __init__(self, directory: Path, layout: str, overrides: tuple[str, ...]) -> None:
        self.directory = directory
        self._output = directory.with_suffix(".out").open("w+")
        command = [sys.executable, "launch/cluster.py", "--layout", layout, f"run.dir={directory}", *overrides]
        self.launcher = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self, timeout_s: float = 400) -> int:
        """The launcher's exit code."""
        return self.launcher.wait(timeout_s)

    def output(self) -> str:
        """What a person saw."""
        self._output.flush()
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

    def kill(self, module: str) -> None:
        """SIGKILL to the processes of a role, as the kernel's memory killer would."""
        victims = [p for p in self.processes("-m", module) if "launch.child" not in p.cmdline()]
        assert victims, f"no process of {module} is alive"
        for process in victims:
            process.send_signal(signal.SIGKILL)

    def wait_for_step(self, step: int, timeout_s: float = 240, *, lineage: int = 0) -> None:
        """Waits until a step is done, in a lineage or a later one."""
        until = time.monotonic() + timeout_s
        while not any(row["step"] >= step and row["lineage"] >= lineage for row in self.rows("step")):
            assert self.launcher.poll() is None, self.output()[-3000:]
            assert time.monotonic() < until, f"no step {step} after {timeout_s} s: {self.output()[-3000:]}"
            time.sleep(0.1)

    def audit(self) -> subprocess.CompletedProcess[str]:
        """`python -m learner.ledger --audit RUN`."""
        command = [sys.executable, "-m", "learner.ledger", "--audit", str(self.directory)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)

    def published(self) -> Path:
        """Where the run publishes its weights."""
        from learner.publish import weights_dir

        return weights_dir(read_resolved(self.directory), self.directory)

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

    def assert_nothing_is_left(self, patience_s: float = 10) -> None:
        """No process of the run lives, and its published weights are gone."""
        until = time.monotonic() + patience_s
        while (alive := self.processes()) and time.monotonic() < until:
            time.sleep(0.2)
        assert not alive, [p.cmdline() for p in alive]
        assert not self.published().exists()

    def close(self) -> None:
        """Ends what a failed test left."""
        if self.launcher.poll() is None:
            os.killpg(self.launcher.pid, signal.SIGKILL)
            self.launcher.wait(20)
        for process in self.processes():
            process.kill()
        self._output.close()


@pytest.fixture
def start_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs, and ends what is left of them."""
    runs: list[Run] = []

    def start(*overrides: str, name: str = "run", layout: str = "local") -> Run:
        runs.append(Run(tmp_path / name, layout, overrides))
        return runs[-1]

    yield start
    for run in runs:
        run.close()
