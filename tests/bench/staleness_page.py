"""The staleness study as a page: a table of final accuracies and a plot of the curves."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt

LAST = 10  # the final accuracy is the mean of so many steps' at the end
_COLORS = {
    "staleness clip": "#2f6fb5",
    "no staleness clip": "#d9722e",
    "generator alone": "#8a8f98",
    "positives only": "#3a9364",
}
_DASHES = {0: "-", 16: "--", 48: "-"}
_STALENESS = (0, 16, 48)
_LABELS = {
    "staleness clip": "weight and staleness clip, δ = 0.1",
    "no staleness clip": "weight, no staleness clip",
    "generator alone": "ratio against the generator alone, one clip",
    "positives only": "positives only",
}
_PAGE = """# Staleness

What staleness does to learning, and what each part of the loss ([algorithm](algorithm.md)) does against it. The
learner's own step trains the tiny addition model of the local layout on groups that the weights of d versions ago
sampled.

    python -m tests.bench.staleness --out runs/staleness --docs docs

{steps} steps of {updates} updates at learning rate {lr:g}, {groups} groups of {size} completions a step,
`loss.clip_low = 0.03`, `loss.clip_high = 0.04`, float32, {seeds} seeds. The first d steps train on groups of the
starting weights. Final accuracy: the share of held-out additions that a sampled answer gets right, mean of the last
{last} steps. In bold the mean over the seeds, in brackets each seed:

{table}

![Accuracy against step](staleness.png)

- At staleness 0 the three are one algorithm here: the staleness clip has no effect, and what sampled the groups is what
  the step starts from. One cell stands for them. Sampler and learner are PyTorch in one process; engine mismatch is no
  part of the study.
- *Ratio against the generator alone* is `loss.proximal = "generator"`. *Positives only* drops every stale completion
  that was wrong.
- With the staleness clip, 48 versions stale ends {with_clip}; without it, {without_clip}.
- It is one small task at one learning rate. The scale of δ on long answers is not measured.
"""

Rows = list[dict[str, Any]]


def write_page(directory: Path, rows: Rows) -> None:
    """Writes staleness.md and staleness.png."""
    from tests.bench.staleness import GROUP_SIZE, GROUPS, UPDATES

    finals = final_accuracies(rows)
    directory.mkdir(parents=True, exist_ok=True)
    page = _PAGE.format(
        steps=rows[0]["steps"],
        updates=UPDATES,
        lr=rows[0]["lr"],
        groups=GROUPS,
        size=GROUP_SIZE,
        seeds=len({row["seed"] for row in rows}),
        last=LAST,
        table=_table(finals),
        with_clip=_beside_synchronous(finals, "staleness clip"),
        without_clip=_beside_synchronous(finals, "no staleness clip"),
    )
    (directory / "staleness.md").write_text(page)
    _draw(directory / "staleness.png", rows)


def final_accuracies(rows: Rows) -> dict[tuple[str, int], dict[int, float]]:
    """Of each loss at each staleness, by seed."""
    finals: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for row in rows:
        finals[row["name"], row["staleness"]][row["seed"]] = float(np.mean(row["accuracy"][-LAST:]))
    return finals


def _table(finals: dict[tuple[str, int], dict[int, float]]) -> str:
    lines = ["| loss | " + " | ".join(f"staleness {d}" for d in _STALENESS) + " |", "|---|---|---|---|"]
    for name in dict.fromkeys(name for name, _ in finals):
        cells = [_cell(finals.get((name, d), {})) for d in _STALENESS]
        if name in ("no staleness clip", "generator alone"):
            cells[0] = "the same"
        lines.append(f"| {_LABELS[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: dict[int, float]) -> str:
    if not values:
        return ""
    seeds = " ".join(f"{values[seed]:.3f}" for seed in sorted(values))
    return f"**{np.mean(list(values.values())):.3f}** ({seeds})"


def _beside_synchronous(finals: dict[tuple[str, int], dict[int, float]], name: str) -> str:
    """How far the loss at the largest staleness is from synchronous, in words."""
    mean = {d: float(np.mean(list(finals[loss, d].values()))) for loss, d in (("staleness clip", 0), (name, 48))}
    difference = mean[48] - mean[0]
    return f"{abs(difference):.3f} {'below' if difference < 0 else 'above'} synchronous"


def _draw(path: Path, rows: Rows) -> None:
    figure, panel = plt.subplots(figsize=(10, 5.5), layout="constrained")
    for name, staleness in dict.fromkeys((row["name"], row["staleness"]) for row in rows):
        curves = np.array([row["accuracy"] for row in rows if (row["name"], row["staleness"]) == (name, staleness)])
        panel.plot(
            np.arange(1, curves.shape[1] + 1),
            _smooth(curves.mean(0)),
            label=_label(name, staleness),
            color=_COLORS[name] if staleness else "black",
            linestyle=_DASHES[staleness],
            linewidth=1.8,
        )
    panel.set(xlabel="step", ylabel="sampled held-out accuracy", ylim=(0, 1))
    panel.set_title(f"Mean over seeds, running mean of {_WINDOW} steps", loc="left", fontsize=10)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _label(name: str, staleness: int) -> str:
    return f"{name}, {staleness} stale" if staleness else "synchronous"


_WINDOW = 5


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the last few steps; of fewer at the beginning."""
    return np.array([values[max(0, i - _WINDOW + 1) : i + 1].mean() for i in range(len(values))])
