"""`python -m tests.bench NAME [--json]` runs one benchmark; `--all --write FILE` runs all and writes them as a page."""

import argparse
import importlib
import json
import platform
from pathlib import Path

from tests.bench.report import Figure, page, table

BENCHMARKS = (
    "wire",
    "ledger",
    "packing",
    "logprobs",
    "memory",
    "learner",
    "routing",
    "saving",
    "weights.codec",
    "weights.transfer",
    "weights.pause",
    "weights.arithmetic",
    "weights.beside",
    "weights.local",
    "local",
)


def _named(name: str) -> list[str]:
    """The benchmark of a name, or all of a group."""
    return [each for each in BENCHMARKS if each == name or each.startswith(f"{name}.")] or [name]


def main() -> None:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmarks to run")
    parser.add_argument("--all", action="store_true", help="run every benchmark")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", type=Path, help="write a page of the figures")
    arguments = parser.parse_args()
    results: dict[str, list[Figure]] = {}
    wanted = BENCHMARKS if arguments.all else [each for name in arguments.names for each in _named(name)]
    for name in wanted:
        results[name] = importlib.import_module(f"tests.bench.{name}").run()
        if not arguments.json:
            print(table(name, results[name]))
    if arguments.json:
        print(json.dumps({name: {f.name: f.value for f in figures} for name, figures in results.items()}))
    if arguments.write:
        arguments.write.write_text(page(results, platform.processor() or platform.machine()))


if __name__ == "__main__":
    main()
