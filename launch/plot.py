"""The run in six panels."""

import io
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from launch.progress import Row, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from launch.report import Rows

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
_BLUE, _ORANGE, _GREEN, _GREY = "#2f6fb5", "#d9722e", "#3a9364", "#8a8f98"
_SMOOTHING, _MIB = 0.2, 1 << 20


def draw(rows: "Rows") -> bytes:
    """A PNG of reward and accuracy, staleness, clipping, throughput, and what new weights take."""
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(3, 2, figsize=(11, 10), sharex=True, layout="constrained")
        _learning(panels[0, 0], rows)
        _staleness(panels[0, 1], rows.steps)
        _clipping(panels[1, 0], rows.steps)
        _throughput(panels[1, 1], rows.steps)
        _seconds_of_weights(panels[2, 0], rows.steps)
        _bytes_of_weights(panels[2, 1], rows.steps)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
        for panel in panels[-1]:
            panel.set_xlabel("step")
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130)
        plt.close(figure)
    return image.getvalue()


def _learning(panel: "Axes", rows: "Rows") -> None:
    from launch.report import mean_accuracy

    panel.set_title("Reward and held-out accuracy")
    steps, rewards = _steps(rows.steps), _column(rows.steps, "reward")
    panel.plot(steps, rewards, color=_BLUE, alpha=0.25)
    panel.plot(steps, smooth(rewards), color=_BLUE, label="reward (smoothed)")
    accuracy = mean_accuracy(rows.evaluations)
    if accuracy:
        panel.plot(
            list(accuracy), list(accuracy.values()), "o-", color=_ORANGE, markersize=4, label="held-out accuracy"
        )
    panel.set_ylim(-0.02, 1.02)
    panel.legend(loc="best")


def _staleness(panel: "Axes", rows: list[Row]) -> None:
    panel.set_title("Staleness of trained completions")
    panel.plot(_steps(rows), _column(rows, "staleness_mean"), color=_BLUE, label="mean")
    panel.step(_steps(rows), _column(rows, "staleness_max"), where="mid", color=_GREY, label="max")
    panel.set_ylim(bottom=0)
    panel.set_ylabel("versions")
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(loc="best")


def _clipping(panel: "Axes", rows: list[Row]) -> None:
    panel.set_title("Share of completions that a clip took out")
    for key, color, label in (
        ("clip_fraction", _BLUE, "trust-region clip"),
        ("staleness_clip_fraction", _ORANGE, "staleness clip"),
    ):
        values = _column(rows, key)
        panel.plot(_steps(rows), values, color=color, alpha=0.25)
        panel.plot(_steps(rows), smooth(values), color=color, label=label)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.legend(loc="best")


def _throughput(panel: "Axes", rows: list[Row]) -> None:
    panel.set_title("Throughput")
    tokens = _column(rows, "tokens_per_completion")
    graded = [a * b for a, b in zip(_column(rows, "verifier_completions_per_s"), tokens, strict=True)]
    for values, color, label in (
        (_column(rows, "generator_tokens_per_s"), _ORANGE, "generators"),
        (graded, _GREEN, "verifiers"),
        (_column(rows, "learner_tokens_per_s"), _BLUE, "learner"),
    ):
        panel.plot(_steps(rows), values, color=color, alpha=0.2)
        panel.plot(_steps(rows), smooth(values), color=color, label=label)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("tokens/s")
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.legend(loc="best")


def _seconds_of_weights(panel: "Axes", rows: list[Row]) -> None:
    panel.set_title("New weights: seconds")
    for key, color, label in (
        ("encode_s", _BLUE, "encoding"),
        ("weights_transfer_s", _GREEN, "transfer"),
        ("weights_decode_s", _GREY, "decoding"),
        ("weights_pause_s", _ORANGE, "the engine's pause"),
    ):
        values = _column(rows, key)
        panel.plot(_steps(rows), values, color=color, alpha=0.2)
        panel.plot(_steps(rows), smooth(values), color=color, label=label)
    panel.set_yscale("log")
    panel.legend(loc="best")


def _bytes_of_weights(panel: "Axes", rows: list[Row]) -> None:
    panel.set_title("New weights: bytes that a generator pulls")
    values = [value / _MIB for value in _column(rows, "weights_pulled_bytes")]
    panel.step(_steps(rows), values, where="mid", color=_BLUE)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("MiB")


def smooth(values: list[float]) -> list[float]:
    """An exponential mean; a NaN leaves it as it was."""
    smoothed: list[float] = []
    mean = float("nan")
    for value in values:
        if value == value:  # not NaN
            mean = value if mean != mean else mean + _SMOOTHING * (value - mean)
        smoothed.append(mean)
    return smoothed


def _steps(rows: list[Row]) -> list[int]:
    return [row["step"] for row in rows]


def _column(rows: list[Row], key: str) -> list[float]:
    return [number(row, key) for row in rows]
