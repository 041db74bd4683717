"""From files of prompts to prompts in the store: read, checked and tokenized before anything else starts."""

import hashlib
import sqlite3
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jinja2
import msgspec

from common import wire
from common.config import Config
from common.errors import DataError
from common.rewards import REWARDS
from common.sections import DataConfig, DataFile
from learner.ledger.database import put_meta
from learner.ledger.datasets import Row, content_hash, read_rows
from learner.ledger.model import ModelDirectory
from learner.ledger.store import Store

_BATCH_ROWS = 1024


class Prepared(NamedTuple):
    """What was prepared: prompts to train on and held out, and those outside the limits."""

    num_train: int
    num_test: int
    num_rejected: int


class _File(NamedTuple):
    """A file of the configuration, by its place in it."""

    split: str
    source: str
    path: Path
    config: DataFile


def prepare(store: Store, config: Config) -> Prepared:
    """Reads, checks and tokenizes all prompts into the store, as one transaction.

    A store that holds them already is left alone. A prompt longer than `data.max_prompt_tokens` stays in the order of
    the data, and each of its visits ends as rejected (`over_long = "drop"`); a held-out one is left out. With
    `"truncate_left"` it is cut to its last tokens, which hold the question's end and the beginning of the answer.

    Raises:
        DataError: A file is wrong, has changed since the run began, or a prompt is both trained on and held out.
        ModelError: The model directory is wrong.
    """
    model = ModelDirectory(Path(config.model))
    files = _files(config.data)
    hashes = [_hash(file.path) for file in files]
    fingerprint = _fingerprint(config.data, model, hashes)
    if not _is_prepared(store, fingerprint, files, hashes):
        with store.transaction() as sql:
            _clear(sql)
            for index, (file, digest) in enumerate(zip(files, hashes, strict=True)):
                _load(sql, index, file, digest, model, config.data)
            _check_disjoint(sql)
            _check_enough(sql)
            put_meta(sql, "prepared", fingerprint.encode())
    return _count(store)


def _files(data: DataConfig) -> list[_File]:
    if not data.train_files:
        raise DataError("data.train: found nothing, expected a file of prompts")
    files: list[_File] = []
    for split, configs in (("train", data.train_files), ("test", data.test_files)):
        for config in configs:
            path = Path(config.path)
            file = _File(split, config.name or path.stem, path, config)
            if any((other.split, other.source) == (split, file.source) for other in files):
                raise DataError(
                    f"data.{split}: found two sets named {file.source!r}, expected each to have a name of its own"
                )
            if config.reward and config.reward not in REWARDS:
                raise DataError(
                    f"data.{split}: {path}: found reward {config.reward!r}, expected one of {', '.join(REWARDS)}"
                )
            files.append(file)
    return files


def _hash(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: not found, expected a file of prompts")
    try:
        return content_hash(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _fingerprint(data: DataConfig, model: ModelDirectory, hashes: list[str]) -> str:
    return hashlib.sha256("\n".join([msgspec.json.encode(data).decode(), model.digest(), *hashes]).encode()).hexdigest()


def _is_prepared(store: Store, fingerprint: str, files: list[_File], hashes: list[str]) -> bool:
    """Whether the store holds these prompts already; other prompts may be replaced until the first visit."""
    found = store.meta("prepared")
    if found is None or not store.rows("SELECT 1 FROM visits LIMIT 1"):
        return found is not None and found.decode() == fingerprint
    known = dict(store.rows("SELECT path, sha256 FROM files"))
    for file, digest in zip(files, hashes, strict=True):
        if known.get(str(file.path), digest) != digest:
            raise DataError(f"{file.path}: found other content than when the run began, expected the same file")
    if found.decode() != fingerprint:
        raise DataError(
            "data, model: found other files, limits or tokenizer than when the run began, expected the same"
        )
    return True


def _clear(sql: sqlite3.Connection) -> None:
    sql.execute("DELETE FROM files")
    sql.execute("DELETE FROM prompts")


def _load(
    sql: sqlite3.Connection, index: int, file: _File, digest: str, model: ModelDirectory, data: DataConfig
) -> None:
    """Puts the prompts of one file into the store."""
    num_prompts = 0
    rows = read_rows(file.path)
    while batch := list(islice(rows, _BATCH_ROWS)):
        for row, whole in zip(batch, _token_ids(batch, file, model, data), strict=True):
            token_ids = whole[-data.max_prompt_tokens :] if data.over_long == "truncate_left" else whole
            prompt = wire.Prompt(
                id=f"{file.split}/{file.source}/{row.number}",
                source=file.source,
                token_ids=wire.int_bytes(token_ids),
                answer=row.answer,
                reward=file.config.reward or row.reward,
            )
            rejected = _rejection(len(token_ids), f"{file.path}:{row.number}", data)
            values = (
                index,
                row.number,
                _encoded(prompt, f"{file.path}:{row.number}"),
                rejected,
                hashlib.sha256(prompt.token_ids).digest(),
            )
            sql.execute("INSERT INTO prompts (file, row, data, rejected, hash) VALUES (?,?,?,?,?)", values)
            num_prompts += 1
    values = (index, file.split, file.source, str(file.path), digest, file.config.weight, num_prompts)
    sql.execute("INSERT INTO files VALUES (?,?,?,?,?,?,?)", values)


def _encoded(prompt: wire.Prompt, where: str) -> bytes:
    """The prompt as it will travel."""
    data = wire.encode(prompt)
    try:
        msgspec.msgpack.decode(data, type=wire.Prompt)
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: found a prompt whose name or answer no message can carry: {error}") from error
    return data


def _token_ids(rows: list[Row], file: _File, model: ModelDirectory, data: DataConfig) -> Iterator[list[int]]:
    """Token ids of each row's prompt: a text as the tokenizer takes it, messages by the model's chat template."""
    texts = [
        row.prompt if isinstance(row.prompt, str) else _render(row.prompt, f"{file.path}:{row.number}", model, data)
        for row in rows
    ]
    plain = iter(
        model.encode(
            [t for t, row in zip(texts, rows, strict=True) if isinstance(row.prompt, str)], add_special_tokens=True
        )
    )
    chats = iter(
        model.encode(
            [t for t, row in zip(texts, rows, strict=True) if not isinstance(row.prompt, str)], add_special_tokens=False
        )
    )
    for row in rows:
        where = f"{file.path}:{row.number}"
        if isinstance(row.prompt, str) and data.system_prompt:
            raise DataError(
                f"{where}: found a string with data.system_prompt set, expected chat messages: it has no effect"
            )
        token_ids = next(plain if isinstance(row.prompt, str) else chats)
        if not token_ids:
            raise DataError(f"{where}: prompt: found no token, expected at least one")
        yield token_ids


def _render(messages: list[dict[str, str]], where: str, model: ModelDirectory, data: DataConfig) -> str:
    if data.system_prompt and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": data.system_prompt}, *messages]
    try:
        return model.render(messages, data.chat_template_kwargs)
    except jinja2.TemplateError as error:
        raise DataError(f"{where}: the chat template refuses the messages: {error}") from error


def _rejection(num_tokens: int, where: str, data: DataConfig) -> str:
    """Why a prompt is outside the limits; empty where it is not."""
    if num_tokens <= data.max_prompt_tokens:
        return ""
    reason = f"found {num_tokens} tokens, expected at most data.max_prompt_tokens = {data.max_prompt_tokens}"
    if data.over_long == "error":
        raise DataError(f"{where}: prompt: {reason}")
    return reason


def _check_disjoint(sql: sqlite3.Connection) -> None:
    """No held-out prompt may be trained on: compared by tokens."""
    both = sql.execute(
        "SELECT a.path, p.row, b.path, q.row FROM prompts p JOIN files a ON a.id = p.file AND a.split = 'train' "
        "JOIN prompts q ON q.hash = p.hash JOIN files b ON b.id = q.file AND b.split = 'test' LIMIT 1"
    ).fetchone()
    if both:
        raise DataError(
            f"{both[0]}:{both[1]}: found the prompt of {both[2]}:{both[3]}, expected no held-out prompt in data.train"
        )


def _check_enough(sql: sqlite3.Connection) -> None:
    """Each file has a prompt within the limits."""
    none = sql.execute(
        "SELECT path, num_prompts FROM files WHERE NOT EXISTS "
        "(SELECT 1 FROM prompts WHERE file = files.id AND rejected = '') LIMIT 1"
    ).fetchone()
    if none:
        raise DataError(f"{none[0]}: found {none[1]} prompts, all too long, expected one within data.max_prompt_tokens")


def _count(store: Store) -> Prepared:
    rows = store.rows(
        "SELECT split, rejected != '', COUNT(*) FROM prompts JOIN files ON files.id = prompts.file GROUP BY 1, 2"
    )
    counts = {(split, bool(rejected)): num for split, rejected, num in rows}
    rejected = sum(num for (_, is_rejected), num in counts.items() if is_rejected)
    return Prepared(counts.get(("train", False), 0), counts.get(("test", False), 0), rejected)
