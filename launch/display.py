"""The run as people watch it: a live table on a terminal, a line a step elsewhere."""

import asyncio
import datetime
import math
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.log import AFRESH, DAMAGED, KERNELS
from launch.progress import FOR_PEOPLE, Progress, Row, number

_POLL_S = 0.5
_RATES = {
    "learner": ("learner_tokens_per_s", "tokens/s"),
    "generator": ("generator_tokens_per_s", "tokens/s"),
    "verifier": ("verifier_completions_per_s", "completions/s"),
    "ledger": ("", ""),
}


class Display:
    """Shows the progress of a run on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def notice(self, text: str) -> None:
        """A line for people."""
        self._console.print(Text(text), soft_wrap=True)

    async def follow(self, progress: Progress) -> None:
        """Shows new rows until cancelled; the last ones too."""
        with self._live() as live:
            try:
                while True:
                    self._show(progress, live)
                    await asyncio.sleep(_POLL_S)
            finally:
                self._show(progress, live)

    @contextmanager
    def _live(self) -> Generator[Live | None]:
        if not self._console.is_terminal:
            yield None
            return
        with Live(console=self._console, auto_refresh=False) as live:
            yield live

    def _show(self, progress: Progress, live: Live | None) -> None:
        rows = progress.read()
        if live is not None:
            live.update(render(progress), refresh=True)
        for row in rows:
            if (live is None or row["kind"] in FOR_PEOPLE) and (text := describe(row, progress.num_steps)):
                self.notice(text)


def render(progress: Progress) -> RenderableType:
    """The live view: a bar, the run's numbers, and a line for each role."""
    if not progress.newest:
        return Group(*_accuracy_lines(progress), Text("starting: the engines come up", style="dim"))
    row = progress.newest
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        Text(f"step {progress.step} of {progress.num_steps}", style="bold"),
        ProgressBar(total=progress.num_steps, completed=progress.step, width=30),
        f"{duration(progress.seconds_left)} left",
    )
    numbers = Table.grid(padding=(0, 3))
    numbers.add_row("reward", f"{number(row, 'reward'):.3f}")
    for source, accuracy in progress.accuracy.items():
        numbers.add_row(f"held-out accuracy, {source}", f"{accuracy:.3f}")
    numbers.add_row(
        "staleness", f"{number(row, 'staleness_mean'):.2f} mean, {number(row, 'staleness_max'):.0f} at most"
    )
    return Group(bar, numbers, _roles(row))


def describe(row: Row, num_steps: int) -> str:
    """A row in one line; empty for rows that are not for people."""
    if row["kind"] == "evaluation":
        return f"step {row['step']}: held-out accuracy {number(row, 'accuracy'):.3f} ({row['source']})"
    if row["kind"] == KERNELS:
        chosen = (f"{kernel.replace('_', ' ')} {provider}" for kernel, provider in row["chosen"].items())
        return f"the learner's kernels: {', '.join(chosen)}"
    if row["kind"] == DAMAGED:
        return (
            f"the checkpoint {row['checkpoint']} is damaged, the learner goes on from {row['instead']} "
            f"(kept as {row['kept_as']}): {row['damage']}"
        )
    if row["kind"] == AFRESH:
        return "no checkpoint to go on from: the learner begins with the starting weights, the ledger serves all again"
    if row["kind"] != "step":
        return ""
    idle = ", ".join(f"{role} {_share(row, role)}" for role in _RATES)
    return (
        f"step {row['step']}/{num_steps}: reward {number(row, 'reward'):.3f}, "
        f"staleness {number(row, 'staleness_mean'):.2f} (max {number(row, 'staleness_max'):.0f}), "
        f"generator {_rate(row, 'generator')}, learner {_rate(row, 'learner')}, idle: {idle}, "
        f"{number(row, 'seconds'):.2f} s"
    )


def duration(seconds: float) -> str:
    """Such as 1:02:03."""
    return "?" if math.isnan(seconds) else str(datetime.timedelta(seconds=round(seconds)))


def _roles(row: Row) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("role")
    table.add_column("throughput", justify="right")
    table.add_column("idle", justify="right")
    for role in _RATES:
        table.add_row(role, _rate(row, role), _share(row, role))
    return table


def _accuracy_lines(progress: Progress) -> list[Text]:
    return [Text(f"held-out accuracy, {source}: {value:.3f}") for source, value in progress.accuracy.items()]


def _rate(row: Row, role: str) -> str:
    key, unit = _RATES[role]
    rate = number(row, key)
    return "" if math.isnan(rate) else f"{rate:,.0f} {unit}"


def _share(row: Row, role: str) -> str:
    share = number(row, f"{role}_idle")
    return "?" if math.isnan(share) else f"{share:.0%}"
