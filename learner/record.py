"""What the learner writes down: a row of metrics a step, evaluations, and samples for people to read."""

import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from common import wire
from common.config import Config
from common.files import Lines
from common.metrics import MetricsWriter, read_metrics
from common.tokenizer import load_tokenizer
from common.versions import Version

SAMPLES = "samples.jsonl"
_END = object()
_Item = TypeVar("_Item")


class Stopwatch:
    """Seconds of each part of a step, and of the step."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` says the seconds."""
        self._clock = clock
        self._since = clock()
        self._parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Generator[None]:
        """Adds the time inside to `part`."""
        began = self._clock()
        try:
            yield
        finally:
            self.add(part, self._clock() - began)

    def add(self, part: str, seconds: float) -> None:
        """Adds a time that was taken elsewhere."""
        self._parts[part] = self._parts.get(part, 0.0) + seconds

    def each(self, part: str, items: Iterator[_Item]) -> Iterator[_Item]:
        """The items; adds the time that it takes to make them."""
        while True:
            with self(part):
                item = next(items, _END)
            if item is _END:
                return
            yield cast(_Item, item)
            del item  # before the next one is made

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, in all (`seconds`) and of each part (`PART_s`)."""
        now = self._clock()
        row = {"seconds": now - self._since} | {f"{part}_s": s for part, s in self._parts.items()}
        self._since, self._parts = now, {}
        return row


class Recorder:
    """Writes metrics.jsonl, TensorBoard events and samples.jsonl. The learner's first rank owns it.

    Attributes:
        num_evaluations: Evaluations that are written already.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config = config
        self.num_evaluations = sum(row["kind"] == "evaluation" for row, _ in read_metrics(run_dir))
        self._metrics = MetricsWriter(run_dir)
        self._samples = Lines(run_dir / SAMPLES)
        self._tokenizer = load_tokenizer(Path(config.model) / "tokenizer.json")

    def step(
        self,
        version: Version,
        groups: tuple[wire.TrainingGroup, ...],
        metrics: dict[str, float],
        times: dict[str, float],
        status: wire.StatusReport,
    ) -> None:
        """Writes the row of the step that made `version`, and one of its groups as a sample."""
        seconds = times["seconds"]
        row = {
            **times,
            **metrics,
            "learner_tokens_per_s": metrics["num_tokens"] / seconds,
            "learner_idle": times["wait_s"] / seconds,
            **_fleet(status),
            **_expired_lengths(groups),
            "epoch": status.epoch,
            "epochs": status.epochs,
        }
        self._metrics.write("step", version.number, steps=self._config.steps, lineage=version.lineage, **row)
        self._sample(version, groups[version.number % len(groups)])

    def evaluations(self, evaluations: tuple[wire.Evaluation, ...]) -> None:
        """Writes a row for each evaluation."""
        for evaluation in evaluations:
            self.num_evaluations += 1
            self._metrics.write(
                "evaluation",
                evaluation.version.number,
                source=evaluation.source,
                accuracy=evaluation.accuracy,
                pass_at_k=evaluation.pass_at_k,
                num_prompts=evaluation.num_prompts,
                num_samples=evaluation.num_samples,
                num_failed=evaluation.num_failed,
                oldest=str(evaluation.oldest),
                newest=str(evaluation.newest),
            )

    def end(
        self, version: Version, reason: str, accounts: dict[str, int], checkpoint: str, status: wire.StatusReport
    ) -> None:
        """Writes the last row and closes the files."""
        idle = {f"{role}_idle": 1 - share for role, share in status.busy_shares.items()}
        self._metrics.write(
            "end",
            version.number,
            reason=reason,
            accounts=accounts,
            checkpoint=checkpoint,
            overlap_share=status.overlap_share,
            learner_wait_share=idle.get("learner_idle", float("nan")),
            **idle,
        )
        self._metrics.close()
        self._samples.close()

    def _sample(self, version: Version, training: wire.TrainingGroup) -> None:
        group = training.scored.group
        prompt = self._tokenizer.decode(wire.ints(training.prompt.token_ids).tolist(), skip_special_tokens=False)
        for completion, grade in zip(group.completions, training.scored.grades, strict=True):
            row = {
                "step": version.number,
                "prompt_id": training.prompt.id,
                "prompt": prompt,
                "text": self._tokenizer.decode(wire.ints(completion.token_ids).tolist(), skip_special_tokens=False),
                "answer": group.answer,
                "outcome": grade.outcome,
                "reward": grade.reward,
                "extracted": grade.extracted,
                "versions": [[span.end, str(span.version)] for span in completion.spans()],
            }
            self._samples.write(json.dumps(row) + "\n")


def _expired_lengths(groups: tuple[wire.TrainingGroup, ...]) -> dict[str, float]:
    """How many of a step's groups had expired before, and how long their completions are; NaN where there are none."""
    expired = [group for group in groups if group.has_expired]
    lengths = [completion.num_tokens for group in expired for completion in group.scored.group.completions]
    p50, p90, longest = np.percentile(lengths or [float("nan")], [50, 90, 100]).tolist()
    row = {"expired_tokens_p50": p50, "expired_tokens_p90": p90, "expired_tokens_max": longest}
    return {"num_groups_expired": float(len(expired))} | row


def _fleet(status: wire.StatusReport) -> dict[str, float]:
    """Throughput and idle share of the other roles, the overlap so far, and the accounts that are still open."""
    ledger_idle = 1 - status.busy_shares.get(wire.Role.LEDGER, 0.0)
    row: dict[str, float] = {"overlap_share": status.overlap_share, "ledger_idle": ledger_idle}
    for role, unit in ((wire.Role.GENERATOR, "tokens"), (wire.Role.VERIFIER, "completions")):
        members = [m for m in status.members if m.role == role]
        if members:
            row[f"{role}_idle"] = 1 - float(np.mean([m.busy_share for m in members]))
        rates = [m.tokens_per_s if unit == "tokens" else m.items_per_s for m in members]
        row[f"{role}_{unit}_per_s"] = float(np.sum(rates))
    row |= _pulls(status)
    states = (
        *(wire.VisitState.FILTERED, wire.VisitState.QUARANTINED),
        *(wire.VisitState.WAITING, wire.VisitState.LEASED, wire.VisitState.SCORED),
    )
    filtered = {"filtered_right": status.filtered_right, "filtered_wrong": status.filtered_wrong}
    row |= {"pin_wait_s": status.pin_wait_s, "refused": sum(status.refused.values())}
    return row | {state.value: status.accounts.get(state, 0) for state in states} | filtered


def _pulls(status: wire.StatusReport) -> dict[str, float]:
    """What the newest weights cost the generators: the mean over those that have any, NaN where none has."""
    names = {name: f"weights_{name}" for name in ("transfer_s", "decode_s", "pause_s", "pulled_bytes")}
    gauges = [member.gauges for member in status.members if "pause_s" in member.gauges]
    return {row: float(np.mean([g[name] for g in gauges])) if gauges else math.nan for name, row in names.items()}
