"""A configuration from a layout file and overrides, and the errors of people who write one."""

import difflib
import math
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import msgspec

from common.config import Config
from common.errors import ConfigError, RunDirectoryError
from common.files import write_atomically

RESOLVED = "config.json"
_PATH = re.compile(r"^(.*?)(?: - at `\$(.*)`)?$", re.DOTALL)


def load_config(layout: Path, overrides: list[str]) -> Config:
    """The configuration of `layout` with `overrides` (lines such as `optimizer.lr=3e-6`) applied.

    Raises:
        ConfigError: A file, line, key or value is wrong, or keys contradict each other.
    """
    values = _read_toml(layout)
    _check_keys(values, Config, str(layout), "")
    for line in overrides:
        _override(values, line)
        _check_keys(values, Config, f"override {line!r}", "")
    values = _merged(msgspec.to_builtins(Config()), values)
    _check_finite(values, "")
    try:
        config = msgspec.convert(values, Config, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(error, values, layout, overrides)) from error
    config.check()
    return config


def write_resolved(config: Config, run_dir: Path) -> None:
    """Writes the resolved configuration to the run directory."""
    write_atomically(run_dir / RESOLVED, msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")


def read_resolved(run_dir: Path) -> Config:
    """The configuration that the launcher wrote.

    Raises:
        RunDirectoryError: There is none.
    """
    path = run_dir / RESOLVED
    try:
        return msgspec.json.decode(path.read_bytes(), type=Config)
    except FileNotFoundError:
        raise RunDirectoryError(f"{path}: not found, expected a run directory that the launcher made") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.toml")))
        raise ConfigError(f"{path}: layout not found, expected one of: {known}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # no TOML, or no text
        raise ConfigError(f"{path}: {error}") from error


def _merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` over `defaults`: a section that gives some keys keeps its own defaults of the rest."""
    both = {
        key: _merged(defaults[key], value) if isinstance(value, dict) and isinstance(defaults.get(key), dict) else value
        for key, value in values.items()
    }
    return defaults | both


def _check_finite(values: dict[str, Any], prefix: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _check_finite(value, f"{prefix}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{key}: found {value}, expected a finite number")


def _override(values: dict[str, Any], line: str) -> None:
    """Applies `section.key=value`; a value that is no TOML is a string, so that paths need no quotes."""
    key, equals, text = line.partition("=")
    if not equals or not re.fullmatch(r"\s*[\w-]+(\.[\w-]+)*\s*", key):
        found = f"found the key {key!r}" if equals else "found no '='"
        raise ConfigError(f"override {line!r}: {found}, expected key=value, such as steps=100 or optimizer.lr=3e-6")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    table = values
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {line!r}: {part} is no section")
    table[last] = value


def _check_keys(values: dict[str, Any], kind: type, where: str, prefix: str) -> None:
    """Raises ConfigError for the first key that the struct `kind` does not have, with the nearest that exists."""
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError(f"{where}: unknown key {path!r}, the nearest is {_nearest(path)!r}")
        inner = _struct_in(hints[key])
        if inner is None:
            continue
        if isinstance(value, dict):
            _check_keys(value, inner, where, f"{path}.")
        for item in value if isinstance(value, list) else ():
            if isinstance(item, dict):
                _check_keys(item, inner, where, f"{path}[].")


def _nearest(path: str) -> str:
    """The key with the same last part, else the most similar one; `x[].y` is key y of the tables in array x."""
    every = _all_keys(Config)
    same_name = [key for key in every if key.rpartition(".")[2] == path.rpartition(".")[2]]
    return difflib.get_close_matches(path, same_name or every, n=1, cutoff=0.0)[0]


def _all_keys(kind: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, hint in typing.get_type_hints(kind).items():
        inner = _struct_in(hint)
        if inner is None or not _is_struct(hint):
            keys.append(f"{prefix}{name}")
        if inner is not None:
            keys += _all_keys(inner, f"{prefix}{name}." if _is_struct(hint) else f"{prefix}{name}[].")
    return keys


def _is_struct(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, msgspec.Struct)


def _struct_in(hint: Any) -> type | None:
    """The struct that a hint is, or has in an array, such as `str | tuple[DataFile, ...]`."""
    if _is_struct(hint):
        return hint
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((a for o in options for a in typing.get_args(o) if _is_struct(a)), None)


def _explain(error: msgspec.ValidationError, values: dict[str, Any], layout: Path, overrides: list[str]) -> str:
    """The place and path of the key, the value that was found, and what was expected."""
    match = _PATH.match(str(error))
    assert match is not None
    message, path = match[1].partition(", got ")[0], (match[2] or "").lstrip(".")
    found: Any = values
    hint: Any = Config
    for part in re.findall(r"[\w-]+", path):
        if isinstance(found, list):
            found = found[int(part)]
            hint = _struct_in(hint)
        else:
            found = found.get(part) if isinstance(found, dict) else found
            hint = typing.get_type_hints(hint).get(part) if _is_struct(hint) else None
    if typing.get_origin(hint) is typing.Literal:
        message = f"expected one of {', '.join(map(str, typing.get_args(hint)))}"
    said = [o for o in overrides if re.match(rf"{re.escape(o.partition('=')[0].strip())}[.\[]", f"{path}.")]
    where = f"override {said[-1]!r}" if said else str(layout)
    return f"{where}: {path}: found {found!r}, {message[:1].lower()}{message[1:].replace('`', '')}"
