"""How figures are shown."""

import os
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured number beside what it is compared with."""

    name: str
    value: float
    unit: str
    beside: str = ""


def table(name: str, figures: list[Figure]) -> str:
    """A Markdown table of one benchmark's figures."""
    rows = [f"| {f.name} | {_number(f.value)} {f.unit} | {f.beside} |" for f in figures]
    return "\n".join([f"### {name}", "", "| figure | measured | beside |", "|---|---|---|", *rows, ""])


def page(results: dict[str, list[Figure]], processor: str) -> str:
    """The page of all benchmarks."""
    head = [
        "# Benchmarks",
        "",
        f"Measured on {time.strftime('%Y-%m-%d')} by `make bench` on {os.cpu_count()} cores ({processor}), no GPU.",
        "One benchmark: `python -m tests.bench NAME [--json]`. Peers' figures are from their own code on a machine of",
        "the same kind, single runs; a figure without a peer has no counterpart there.",
        "",
    ]
    return "\n".join(head + [table(name, figures) for name, figures in results.items()])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
