"""`python -m launch.reference > docs/configuration.md`: every key of the configuration, from the code that reads it."""

import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

import msgspec

from common.config import Config
from common.resume import MAY_CHANGE
from common.sections import DataFile, Section

HEAD = r"""# Configuration

This page is made by `python -m launch.reference`; a test compares it with the code. The keys come first, then what the
checks refuse.

A run is configured by a layout and by overrides:

    python launch/cluster.py --layout local [--dry-run] [key=value ...]

**Layouts** are TOML files: `--layout NAME` is `launch/layouts/NAME.toml`, and `--layout PATH` is any file whose path
has a `/` or ends in `.toml`. A key that a layout leaves out has the default below. Layouts do not inherit from each
other.

**Overrides** are lines of TOML and win over the layout, the last one over those before it: `optimizer.lr=3e-6`,
`sampling.stop=["\n\n"]`, `data.test=[{path="a.jsonl"}, {path="b.parquet", name="b"}]`. A value that is no TOML is taken
as text, so paths need no quotes: `model=../qwen`. Relative paths are meant from where the command is typed.

**`--dry-run`** makes the checks, prints the resolved configuration as a layout that comes to the same, with the
processes, their command lines and the derived numbers as comments, and starts nothing. The resolved configuration is in
the run directory, as `config.json`, before any process starts; every process reads it there.
"""
RESUME = f"""## What may change when a run goes on

With `run.resume=auto` the command that starts a run goes on with the one that is in the run directory: stopped, crashed
or complete with a larger `steps`. It begins one where the directory is new or empty. The configuration is compared with
the run's `config.json`, what has changed is said, and the new one takes its place. Only these keys may change
(`common/resume.py`):

{", ".join(f"`{rule}`" for rule in MAY_CHANGE)}.

The others decide how many groups make up a step and what is stored of one (`group_size`, `groups_per_step`,
`updates_per_step`, `learner.routing_replay`), which prompts come in which order (`data.*`, `seed`, `tiny.*`), what the
weights are (`model`, `learner.dtype`), what is sampled (`sampling.*`), or what the run's figures mean (`max_staleness`,
and how it is evaluated). `--dry-run` makes the same comparison.
"""
TAIL = """## What the checks refuse

Each refusal is one line, `sluice: WHERE: KEY: found X, expected Y`, with exit code 2, before the run's processes
start. A layout or override is named as it was written:

    sluice: override 'optimizer.lr=-1': optimizer.lr: found -1, expected float > 0.0
    sluice: override 'optimizer.l=1': unknown key 'optimizer.l', the nearest is 'optimizer.lr'

- Unknown keys, values of a wrong type or out of range (`common/layout.py`).
- Keys that contradict each other (`common/contradictions.py`, `common/contradictions_of_data.py`): `groups_per_step`
  that `updates_per_step` does not divide; `model` without `data.train`, `data.train` without `model`, `data.test`
  without `data.train`; warm-up longer than the run; `learner.max_tokens_per_microbatch` or
  `generator.max_total_tokens` below `data.max_prompt_tokens + sampling.max_tokens`; `sampling.temperature` 0 or
  `sampling.top_k` 1, which make every group uniform; ranks and experts that do not divide; more replicas than an
  update has completions.
- Keys without effect beside others (the same files), among them: several evaluation samples at temperature 0;
  `loss.proximal` other than `recompute` with one update a step and `max_staleness` 0, and `interpolate` with
  `max_staleness` up to 1; `loss.weight_cap` and `loss.staleness_clip` with `loss.proximal` `generator`;
  `loss.staleness_clip` and `loss.narrowing` with `max_staleness` 0; `loss.narrowing_floor` without `loss.narrowing`,
  and `loss.narrowing` with a floor of 1; `loss.kl_coefficient` where the run has one update; `optimizer.schedule` that
  ends where it begins; a warm-up of less than one update; the gate of the other dtype; `weight` of an only file and of
  held-out ones; `run.name` beside `run.dir`.
- What the model's sizes do not allow (`common/shape.py`, `launch/checks.py`, `launch/estimate.py`): heads, layers,
  vocabulary or experts that ranks or an engine's GPUs do not divide; fewer positions than tokens; memory of a rank, an
  engine or a node that is not enough, where GPUs are assigned.
- What this machine cannot start (`launch/checks.py`): more nodes than one, more GPUs than it has.
- What is missing, broken or taken (`launch/checks.py`, `launch/run_directory.py`): files of prompts; a model directory
  without config, fast tokenizer or whole weights, or of another architecture than the supported ones; `weights.dir`
  without room for the weights `weights.retention` + 2 times, once for each generator, and deltas; `run.host` and
  `run.ledger_port` that cannot be bound; a run directory that is not new or empty, unless a run goes on there.
- What is wrong with the prompts (docs/data.md).

What is allowed and may surprise is said instead, as `note:`, at the start and in the dry run (`launch/notices.py`): one
update a step, where the trust-region clip never binds; clips so wide that they hardly can; the memory and the forward
pass of a reference; truncated sampling; no held-out prompts; shuffled rewards.
"""


def reference() -> str:
    """The page."""
    sections = [*_sections("Top level", Config, ""), *_section("A file of `data.train` or `data.test`", DataFile, "")]
    return "\n".join([HEAD, *sections, RESUME, TAIL])


def _sections(title: str, section: type[Section], prefix: str, values: Section | None = None) -> Iterator[str]:
    """A section and those within it."""
    yield from _section(title, section, prefix, values)
    for field in msgspec.structs.fields(section):
        if _is_section(field.type):
            path = f"{prefix}{field.name}"
            yield from _sections(f"`[{path}]`", field.type, f"{path}.", field.default)


def _section(title: str, section: type[Section], prefix: str, values: Section | None = None) -> Iterator[str]:
    """One table; `values` are its defaults where the section around it has others than its own."""
    described = _attributes(section)
    summary = (inspect.getdoc(section) or "").splitlines()[0]
    yield f"## {title}\n\n{summary}\n\n| key | type | default | what it is |\n|---|---|---|---|"
    for field in msgspec.structs.fields(section):
        if not _is_section(field.type):
            default = "(required)" if field.required else f"`{_default(field, values)}`"
            yield f"| `{prefix}{field.name}` | {_type(field.type)} | {default} | {described[field.name]} |"
    yield ""


def _default(field: msgspec.structs.FieldInfo, values: Section | None) -> str:
    value: Any = field.default
    if values is not None:
        value = getattr(values, field.name)
    elif value is msgspec.NODEFAULT:
        value = field.default_factory()
    return json.dumps(msgspec.to_builtins(value))


def _attributes(section: type[Section]) -> dict[str, str]:
    """The sentences under `Attributes:` in a section's docstring."""
    text = (inspect.getdoc(section) or "").partition("Attributes:")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", text, re.MULTILINE)
    return {name: " ".join(sentence.split()).replace("|", "\\|") for name, sentence in entries}


def _type(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_type, typing.get_args(hint)))
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        base, meta = typing.get_args(hint)
        bounds = {"ge": ">=", "gt": ">", "le": "<="}
        given = {sign: getattr(meta, name) for name, sign in bounds.items()}
        limits = [f"{sign} {bound:,}" for sign, bound in given.items() if bound is not None]
        return f"{_type(base)} {', '.join(limits)}"
    if origin is typing.Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in typing.get_args(hint))
    if origin in (tuple, dict):
        return "list of " + _type(typing.get_args(hint)[0]) if origin is tuple else "table"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "DataFile": "files"}[
        hint.__name__
    ]


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


if __name__ == "__main__":
    sys.stdout.write(reference())
