"""The local layout: start-up and memory of each role, steps a minute, idle shares, asynchronous beside synchronous."""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

from common.metrics import read_metrics
from tests.bench.report import Figure

REPOSITORY = Path(__file__).resolve().parents[2]
ROLES = {"ledger": "learner.ledger", "learner": "learner", "generator": "generator", "verifier": "verifier"}
WARM_UP_STEPS = 4
# Without the filter each step samples, grades and trains the same number of completions, so that steps compare.
EQUAL_WORK = ("loss.filter_uniform=false", "steps=30", "evaluation.every=30", "learner.checkpoint_every=30")


class MeasuredRun:
    """One run of the local layout, and what it used."""

    def __init__(self, *overrides: str) -> None:
        with tempfile.TemporaryDirectory() as parent:
            self.directory = Path(parent) / "run"
            self.peak_bytes = dict.fromkeys(ROLES, 0)
            self._over = threading.Event()
            watcher = threading.Thread(target=self._watch_memory)
            watcher.start()
            command = [
                sys.executable,
                "launch/cluster.py",
                "--layout",
                "local",
                f"run.dir={self.directory}",
                *overrides,
            ]
            try:
                subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
            finally:
                self._over.set()
                watcher.join()
            self.rows = [row for row, _ in read_metrics(self.directory)]
            self.summary: dict[str, Any] = json.loads((self.directory / "summary.json").read_text())
            self.ready_s = {role: self._ready_s(role) for role in ROLES}

    def seconds_per_step(self) -> float:
        """Wall-clock of a step, evaluations, publishing and waiting included, after the first few."""
        times = [row["time"] for row in self.rows if row["kind"] == "step"][WARM_UP_STEPS:]
        return (times[-1] - times[0]) / (len(times) - 1)

    def _ready_s(self, role: str) -> float:
        for path in (self.directory / "logs").glob(f"{role}*.jsonl"):
            for line in path.read_text().splitlines():
                if (event := json.loads(line))["event"] == "ready":
                    return event["seconds"]
        raise AssertionError(f"{role} never said that it is ready")

    def _watch_memory(self) -> None:
        while not self._over.wait(1.0):
            for role, module in ROLES.items():
                self.peak_bytes[role] = max(self.peak_bytes[role], self._memory_bytes(module))

    def _memory_bytes(self, module: str) -> int:
        """Proportional set size of a role's process and its children."""
        size_bytes = 0
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            is_wrapper = "launch.child" in line or "torch.distributed.run" in line
            if str(self.directory) in line and module in line and "-m" in line and not is_wrapper:
                for part in (process, *process.children(recursive=True)):
                    size_bytes += _proportional_bytes(part)
        return size_bytes


def run() -> list[Figure]:
    """Three runs."""
    layout = MeasuredRun()
    figures = [Figure(f"{role}: start-up until it is ready", layout.ready_s[role], "s") for role in ROLES]
    figures += [Figure(f"{role}: memory at its peak", layout.peak_bytes[role] / 2**20, "MiB") for role in ROLES]
    figures.append(Figure("steps a minute", 60 / layout.seconds_per_step(), ""))
    figures += [Figure(f"{role}: idle share", layout.summary["idle"][role], "") for role in ROLES]
    figures.append(Figure("generator busy while the learner steps", layout.summary["overlap_share"], "of the run"))
    figures.append(Figure("learner waiting", layout.summary["learner_wait_share"], "of the run"))
    asynchronous, synchronous = MeasuredRun(*EQUAL_WORK), MeasuredRun(*EQUAL_WORK, "max_staleness=0")
    ratio = synchronous.seconds_per_step() / asynchronous.seconds_per_step()
    figures.append(Figure("a step, asynchronous (max_staleness = 4), equal work", asynchronous.seconds_per_step(), "s"))
    figures.append(Figure("a step, synchronous (max_staleness = 0), equal work", synchronous.seconds_per_step(), "s"))
    figures.append(Figure("synchronous / asynchronous", ratio, "x", "above 1: asynchronous is faster"))
    figures.append(Figure("overlap, asynchronous, equal work", asynchronous.summary["overlap_share"], "of the run"))
    figures.append(Figure("overlap, synchronous, equal work", synchronous.summary["overlap_share"], "of the run"))
    return figures


def _proportional_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
