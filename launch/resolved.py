"""The dry run's text: a layout in TOML that comes to the same configuration, with the plan in its comments."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import msgspec

from common.config import Config
from common.shape import ModelShape
from launch.machines import machine_lines
from launch.notices import notices
from launch.placement import place
from launch.plan import REPOSITORY, ProcessPlan, derived_numbers, plan_processes


def describe(config: Config, run_dir: Path, shape: ModelShape) -> str:
    """The resolved configuration as a layout; in comments what it means, the machines, numbers and processes."""
    notes = [f"note: {line}" for line in notices(config, shape)]
    numbers = [f"  {name}: {number:,}" for name, number in derived_numbers(config).items()]
    plan = [
        f"run directory: {run_dir}",
        *notes,
        *machine_lines(config, shape),
        "numbers:",
        *numbers,
        "processes, in the order in which they start:",
        *(f"  {_shown(process, config)}" for process in plan_processes(config, run_dir)),
    ]
    return "\n".join([*(f"# {line}" for line in plan), "", to_toml(config)])


def to_toml(config: Config) -> str:
    """The configuration as a layout."""
    values: dict[str, Any] = msgspec.to_builtins(config)
    return "\n".join([*_table(values, ""), ""])


def _table(values: dict[str, Any], path: str) -> list[str]:
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    lines = [f"{_key(name)} = {_value(value)}" for name, value in values.items() if name not in tables]
    for name, table in tables.items():
        inner = f"{path}.{_key(name)}".lstrip(".")
        lines += ["", f"[{inner}]", *_table(table, inner)]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(name)} = {_value(v)}' for name, v in value.items())}}}"
    return repr(value)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else json.dumps(name)


def _shown(plan: ProcessPlan, config: Config) -> str:
    """A command line for people: with `python` for this interpreter, and paths from the repository."""
    words = [f"{name}={value}" for name, value in plan.environment.items()]
    words += ["python" if word == sys.executable else word.removeprefix(f"{REPOSITORY}/") for word in plan.command]
    nodes = _nodes(plan.name, config)
    where = f" on node {nodes}" if nodes else ""
    return f"{plan.name}{where}: {shlex.join(words)}".replace("'", "")


def _nodes(name: str, config: Config) -> str:
    """Where a process runs, in a plan of several nodes; empty in one of a single node."""
    if config.placement.gpus_per_node == 0 or (placement := place(config)).num_nodes == 1:
        return ""
    if name == "learner":
        last = placement.ranks[-1].node
        return f"0-{last}" if last else "0"
    return str(next((engine.node for engine in placement.engines if engine.name == name), 0))
