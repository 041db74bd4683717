"""Files of prompts: JSONL and Parquet, with columns `prompt` and `answer`, or verl's."""

import codecs
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import DataError
from common.rewards import DEFAULT_REWARD, REWARDS

_COLUMNS = ("prompt", "answer", "reward_model", "data_source")
_BATCH_ROWS = 1024


class Row(NamedTuple):
    """One row, checked.

    Attributes:
        number: Line or row of the file, from 1.
        prompt: A text, or chat messages.
        answer: The reference answer.
        reward: Name of the reward that the row asks for.
    """

    number: int
    prompt: str | list[dict[str, str]]
    answer: str
    reward: str


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in order.

    Raises:
        DataError: The file is missing, broken, empty, or a row is not as expected.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: found a file of type {path.suffix or '(none)'!r}, expected .jsonl or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: not found, expected a file of prompts")
    num_rows = 0
    for number, values in readers[path.suffix](path):
        num_rows += 1
        yield _row(values, number, f"{path}:{number}")
    if not num_rows:
        raise DataError(f"{path}: found no row, expected at least one prompt")


def content_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield number, _object(text, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{where}: broken JSON: {error}, expected one object in UTF-8 on each line") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: found {_kind(values)}, expected an object with columns prompt and answer")
    return values


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in _COLUMNS if name in names]
            if "prompt" not in columns or not {"answer", "reward_model"} & set(columns):
                _refuse_columns(names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _row(values: dict[str, Any], number: int, where: str) -> Row:
    if "prompt" not in values or not {"answer", "reward_model"} & set(values):
        _refuse_columns(list(values), where)
    answer = values["answer"] if "answer" in values else _ground_truth(values["reward_model"], where)
    source = values.get("data_source")
    reward = source if source in REWARDS else DEFAULT_REWARD
    return Row(number, _prompt(values["prompt"], where), _answer(answer, where), reward)


def _refuse_columns(names: list[str], where: str) -> None:
    found = ", ".join(names) or "none"
    raise DataError(
        f"{where}: found columns {found}, expected prompt and answer, or prompt and reward_model.ground_truth"
    )


def _prompt(value: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: prompt: found {_kind(value)}, expected text or chat messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(
                f"{where}: prompt: found a message {message!r:.80}, expected a role and a content, both strings"
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _ground_truth(value: Any, where: str) -> Any:
    if not isinstance(value, dict) or "ground_truth" not in value:
        raise DataError(f"{where}: reward_model: found {_kind(value)}, expected an object with a ground_truth")
    return value["ground_truth"]


def _answer(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DataError(f"{where}: answer: found {_kind(value)}, expected text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: answer: found {value}, expected text or a finite number")
    return str(value)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    kind = {"str": "string", "bool": "boolean", "dict": "object", "int": "number", "float": "number"}
    name = kind.get(type(value).__name__, type(value).__name__)
    empty = not value.strip() if isinstance(value, str) else value in ([], {})
    return f"an empty {name}" if empty else f"an {name}" if name == "object" else f"a {name}"
