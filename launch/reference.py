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
from common.sections import DataFile, Section

HEAD = """\
# Configuration

A run is configured by a layout, a TOML file in `launch/layouts/` or anywhere, and by overrides on the command line. An
override is a line of TOML: `optimizer.lr=3e-6`, `data.train="train.jsonl"` (quotes may be left out),
`sampling.stop=["\\\\n\\\\n"]`. `--dry-run` prints the resolved configuration as a layout, with the processes, their
command lines and the derived numbers, and starts nothing. The resolved configuration is in the run directory, as
`config.json`, before any process starts.

An unknown key is an error that names the nearest key; so is a value of a wrong type or out of range, and so are keys
that contradict each other or have no effect together (`common/config.py`): the message says what was found, what was
expected and where, and the exit code is 2.

This page is made by `python -m launch.reference`; a test compares it with the code.
"""
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", DataFile: "files"}


def reference() -> str:
    """The page."""
    parts = [HEAD, *_section("Top level", Config, "")]
    for name, hint in typing.get_type_hints(Config).items():
        if _is_section(hint):
            parts += _section(f"`[{name}]`", hint, f"{name}.")
    parts += _section("A file of `data.train` or `data.test`", DataFile, "")
    return "\n".join(parts)


def _section(title: str, section: type[Section], prefix: str) -> Iterator[str]:
    described = _attributes(section)
    summary = (inspect.getdoc(section) or "").splitlines()[0]
    yield f"## {title}\n\n{summary}\n\n| key | type | default | what it is |\n|---|---|---|---|"
    for field in msgspec.structs.fields(section):
        if not _is_section(field.type):
            default = "(required)" if field.required else f"`{_default(field.default, field.default_factory)}`"
            yield f"| `{prefix}{field.name}` | {_type(field.type)} | {default} | {described[field.name]} |"
    yield ""


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


def _default(value: Any, factory: Any) -> str:
    return json.dumps(msgspec.to_builtins(factory() if value is msgspec.NODEFAULT else value))


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


if __name__ == "__main__":
    sys.stdout.write(reference())
