"""What staleness does to learning, and what each part of the loss does against it.

    python -m tests.bench.staleness --out DIR                  # every variant, about an hour on one core
    python -m tests.bench.staleness --out DIR --docs docs      # and writes docs/staleness.md and docs/staleness.png

The learner's own step (learner/step.py: advantages, packing, proximal logprobs, loss) trains the tiny addition model in
one process. Its groups are sampled by weights that are d versions old: each step's weights sample the groups of the
step d later, and the starting weights those of the first d. A variant that is finished is a line of DIR/curves.jsonl
and is not run again, so that the study may be interrupted.
"""

import argparse
import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.config import Config
from common.learning import LearnerConfig, LossConfig
from common.sections import SamplingConfig
from common.versions import Lineages, Version
from launch.tiny import split_pairs
from learner.step import train_step
from tests.bench.addition import MAX_TOKENS, accuracy, batches, load_model, sample_groups
from tests.bench.report import Figure
from tests.learner.plain import PlainPolicy

STEPS, LR = 150, 3e-4
SEEDS = (0, 1, 2)
GROUPS, GROUP_SIZE, UPDATES = 16, 16, 4
OFF = 1e9  # of the staleness clip: no ratio reaches it
KEPT = (
    "staleness_mean",
    "clip_fraction",
    "staleness_clip_fraction",
    "weight_mean",
    "ratio_mean",
    "entropy",
    "grad_norm",
)


class Variant(NamedTuple):
    """One loss at one staleness.

    Attributes:
        name: Of the loss.
        staleness: d.
    """

    name: str
    staleness: int


LOSSES: dict[str, dict[str, Any]] = {
    "staleness clip": {"staleness_clip": 0.1},
    "no staleness clip": {"staleness_clip": OFF},
    "generator alone": {"proximal": "generator"},
    "positives only": {"staleness_clip": -OFF},  # every stale completion that was wrong is clipped
}
VARIANTS = (
    Variant("staleness clip", 0),
    Variant("staleness clip", 48),
    Variant("no staleness clip", 48),
    Variant("staleness clip", 16),
    Variant("no staleness clip", 16),
    Variant("generator alone", 48),
    Variant("generator alone", 16),
    Variant("positives only", 48),
)


def main() -> None:
    """Runs what is missing, and writes the table and the plot where asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.staleness", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the models and the curves")
    parser.add_argument("--docs", type=Path, help="directory to write staleness.md and staleness.png to")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lr", type=float, default=LR)
    arguments = parser.parse_args()
    rows = study(arguments.out, arguments.seeds, arguments.steps, arguments.lr)
    if arguments.docs:
        from tests.bench.staleness_page import write_page

        write_page(arguments.docs, rows)


def run() -> list[Figure]:
    """The final accuracies as figures, mean over the seeds: for `python -m tests.bench staleness`."""
    from tests.bench.staleness_page import final_accuracies

    finals = final_accuracies(study(Path("runs/staleness"), SEEDS, STEPS, LR))
    return [
        Figure(f"{name}, {staleness} versions stale", sum(values.values()) / len(values), "sampled accuracy")
        for (name, staleness), values in finals.items()
    ]


def study(out: Path, seeds: tuple[int, ...], steps: int, lr: float) -> list[dict[str, Any]]:
    """The row of each variant and seed; those that `out` lacks are trained, and appended one by one."""
    torch.set_num_threads(1)
    path = out / "curves.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = {_key(row): row for row in known}
    wanted = [{**variant._asdict(), "seed": s, "steps": steps, "lr": lr} for s in seeds for variant in VARIANTS]
    for settings in wanted:
        if _key(settings) in rows:
            continue
        rows[_key(settings)] = row = settings | _train(out, **settings)
        with path.open("a") as file:
            file.write(f"{json.dumps(row)}\n")
        sys.stdout.write(f"{settings}: {sum(row['accuracy'][-10:]) / 10:.3f} in {row['seconds']:.0f} s\n")
        sys.stdout.flush()
    return [rows[_key(settings)] for settings in wanted]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("name", "staleness", "seed", "steps", "lr"))


def _train(out: Path, *, name: str, staleness: int, seed: int, steps: int, lr: float) -> dict[str, Any]:
    """Trains one variant; accuracy of the weights after each step, on held-out pairs, and the step's metrics."""
    began = time.monotonic()
    model = load_model(out / f"model-{seed}", seed)
    policy = PlainPolicy(model, lr)
    config = _config(name, staleness, seed)
    held_out = split_pairs(seed).test
    prompts = batches(seed, GROUPS)
    rng = torch.Generator().manual_seed(seed)
    under_way = deque(sample_groups(model, next(prompts), GROUP_SIZE, 0, rng) for _ in range(staleness))
    curve: dict[str, list[float]] = {key: [] for key in ("accuracy", *KEPT)}
    for number in range(steps):
        under_way.append(sample_groups(model, next(prompts), GROUP_SIZE, number, rng))
        metrics = train_step(policy, under_way.popleft(), config, Version(0, number), Lineages())
        for key in KEPT:
            curve[key].append(round(metrics[key], 5))
        curve["accuracy"].append(accuracy(model, held_out, rng))
    return {**curve, "seconds": round(time.monotonic() - began, 1)}


def _config(name: str, staleness: int, seed: int) -> Config:
    return Config(
        seed=seed,
        group_size=GROUP_SIZE,
        groups_per_step=GROUPS,
        updates_per_step=UPDATES,
        max_staleness=staleness,
        sampling=SamplingConfig(max_tokens=MAX_TOKENS),
        loss=LossConfig(clip_low=0.03, clip_high=0.04, **LOSSES[name]),
        learner=LearnerConfig(max_tokens_per_microbatch=4096),
    )


if __name__ == "__main__":
    main()
