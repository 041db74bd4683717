"""The ledger's SQLite file: every change is one transaction, and a restart finds the state as it was stored.

WAL with synchronous=NORMAL: a killed process loses nothing that was answered. What this does not do: survive the loss
of the machine's memory without losing the last transactions (the file stays consistent).
"""

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from common import wire
from common.config import Config
from common.errors import DataError, RunDirectoryError
from learner.ledger.evaluations import EvaluationChanges, Evaluations
from learner.ledger.order import DataOrder, PromptRange
from learner.ledger.routes import routes_check
from learner.ledger.rows import evaluation_row, evaluation_visit_of, visit_of, visit_row
from learner.ledger.schema import APPLICATION_ID, FILE, SCHEMA_VERSION, TABLES
from learner.ledger.state import Ledger
from learner.ledger.visits import ENDED, Changes, Head


class Store:
    """The file of one run."""

    def __init__(self, run_dir: Path, *, read_only: bool = False) -> None:
        """Opens the run's file, or makes it.

        Raises:
            RunDirectoryError: It is not a ledger, of another schema, broken, or cannot be written.
        """
        self.path = run_dir / FILE
        with self._mapped():
            mode = "ro" if read_only else "rwc"
            self._sql = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)
            self._check_kind()
            if not read_only:
                self._sql.execute("PRAGMA journal_mode=WAL")
                self._sql.execute("PRAGMA synchronous=NORMAL")
                self._sql.executescript(
                    f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION}; {TABLES}"
                )

    def check_whole(self) -> None:
        """Reads every page: about a second a gigabyte that is in the page cache, else what the disk takes.

        Raises:
            RunDirectoryError: The file is damaged.
        """
        if (found := self.rows("PRAGMA quick_check(1)")[0][0]) != "ok":
            raise RunDirectoryError(f"{self.path}: found a damaged file ({found}), expected a whole one")

    def close(self) -> None:
        """Closes the file."""
        self._sql.close()

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """All statements in the block are stored, or none.

        Raises:
            RunDirectoryError: The disk is full, or the file cannot be written.
        """
        with self._mapped():
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield self._sql
            except BaseException:
                self._sql.rollback()
                raise
            self._sql.commit()

    def begin_reading(self) -> None:
        """All later queries see the file as it is now; for a reader that changes nothing."""
        with self._mapped():
            self._sql.execute("BEGIN")

    def rows(self, query: str, *values: object) -> list[Any]:
        """All rows of a query."""
        with self._mapped():
            return self._sql.execute(query, values).fetchall()

    def meta(self, key: str) -> bytes | None:
        """A value by name."""
        rows = self.rows("SELECT value FROM meta WHERE key = ?", key)
        return rows[0][0] if rows else None

    def identify(self, run: str) -> int:
        """Checks or sets the run that the file belongs to; returns how often the ledger has started, this one included.

        Raises:
            RunDirectoryError: The file is of another run.
        """
        found = self.meta("run")
        if found is not None and found.decode() != run:
            raise RunDirectoryError(f"{self.path}: found the ledger of another run, expected the one of this directory")
        incarnation = int(self.meta("incarnation") or b"0") + 1
        with self.transaction() as sql:
            put_meta(sql, "run", run.encode())
            put_meta(sql, "incarnation", str(incarnation).encode())
        return incarnation

    def save(self, changes: Changes, evaluations: EvaluationChanges) -> None:
        """Stores what a call changed, as one transaction."""
        if not changes and not evaluations:
            return
        with self.transaction() as sql:
            if changes.head is not None:
                put_meta(sql, "head", msgspec.json.encode(changes.head))
            for statement, rows in _statements(changes, evaluations):
                if rows:
                    sql.executemany(statement, rows)
            if evaluations.visits:
                lowest = min(int(self.meta("lowest") or b"0"), *(v.number for v in evaluations.visits))
                put_meta(sql, "lowest", str(lowest).encode())

    def save_manifest(self, manifest: wire.Manifest) -> None:
        """Keeps the newest published version."""
        with self.transaction() as sql:
            put_meta(sql, "manifest", msgspec.msgpack.encode(manifest))

    def begin_session(self) -> None:
        """Nobody is in the run yet, and nothing is published."""
        with self.transaction() as sql:
            sql.execute("DELETE FROM members")
            sql.execute("DELETE FROM meta WHERE key = 'manifest'")

    def manifest(self) -> wire.Manifest | None:
        """The newest published version; None before the first."""
        data = self.meta("manifest")
        return None if data is None else msgspec.msgpack.decode(data, type=wire.Manifest)

    def save_learner(self, peer: bytes) -> None:
        """Keeps which peer is the learner, so that a restarted ledger knows it."""
        with self.transaction() as sql:
            put_meta(sql, "learner", peer)

    def learner(self) -> bytes:
        """Which peer is the learner; empty before the first."""
        return self.meta("learner") or b""

    def save_member(self, name: str, role: str, endpoint: str) -> None:
        """Keeps who is in the run, so that a restarted ledger knows them."""
        with self.transaction() as sql:
            sql.execute("INSERT OR REPLACE INTO members VALUES (?,?,?)", (name, role, endpoint))

    def drop_member(self, name: str) -> None:
        """Forgets a process."""
        with self.transaction() as sql:
            sql.execute("DELETE FROM members WHERE name = ?", (name,))

    def members(self) -> list[tuple[str, str, str]]:
        """Name, role and endpoint of those who were in the run."""
        return self.rows("SELECT name, role, endpoint FROM members")

    def payload(self, visit: int) -> wire.ScoredGroup:
        """The scored group of a visit."""
        data = self.rows("SELECT data FROM payloads WHERE visit = ?", visit)[0][0]
        return msgspec.msgpack.decode(data, type=wire.ScoredGroup)

    def prompt(self, row: int) -> wire.Prompt:
        """The prompt in a row."""
        data = self.rows("SELECT data FROM prompts WHERE id = ?", row)[0][0]
        return msgspec.msgpack.decode(data, type=wire.Prompt)

    def ledger(self, config: Config, now: float) -> Ledger:
        """The state as it was stored; leases that were open have until a heartbeat's timeout from `now` to be renewed.

        Raises:
            DataError: No prompts were prepared.
        """
        order = self._order(config)
        check = routes_check(config, lambda row: len(wire.ints(self.prompt(row).token_ids)))
        rejected = dict(self.rows("SELECT id, rejected FROM prompts WHERE rejected != ''"))

        def prompt_of(position: int) -> tuple[int, str]:
            row = order.prompt(position)
            return row, rejected.get(row, "")

        head = self.head()
        kept = {number for (number,) in self.rows("SELECT visit FROM payloads")}
        live, ended = [], []
        for row in self.rows("SELECT * FROM visits ORDER BY number"):
            visit = visit_of(row, now)
            if visit.state in ENDED or (visit.state is wire.VisitState.TRAINED and visit.number not in kept):
                ended.append((visit.number, visit.state))
            else:
                live.append(visit)
        return Ledger(config, prompt_of, routes_check=check, head=head, live=live, ended=ended)

    def filtered(self) -> dict[str, int]:
        """How many visits were filtered for each reason."""
        return dict(self.rows("SELECT reason, COUNT(*) FROM visits WHERE state = 'filtered' GROUP BY reason"))

    def head(self) -> Head:
        """All but the visits."""
        data = self.meta("head")
        return Head() if data is None else msgspec.json.decode(data, type=Head)

    def evaluations(self, config: Config, now: float) -> Evaluations:
        """The evaluations as they were stored."""
        prompts = self.rows(
            "SELECT prompts.id, files.source FROM prompts JOIN files ON files.id = prompts.file "
            "WHERE files.split = 'test' AND rejected = '' ORDER BY prompts.id"
        )
        return Evaluations(
            config,
            prompts,
            visits=[
                evaluation_visit_of(row, now)
                for row in self.rows("SELECT * FROM evaluation_visits ORDER BY number DESC")
            ],
            finished=[
                msgspec.msgpack.decode(data, type=wire.Evaluation)
                for (data,) in self.rows("SELECT data FROM evaluations ORDER BY id")
            ],
            next_number=int(self.meta("lowest") or b"0") - 1,
        )

    def _order(self, config: Config) -> DataOrder:
        files = self.rows(
            "SELECT MIN(prompts.id), COUNT(*), weight FROM prompts JOIN files ON files.id = prompts.file "
            "WHERE files.split = 'train' GROUP BY files.id ORDER BY files.id"
        )
        if not files or self.meta("prepared") is None:
            raise DataError(f"{self.path}: found no prompts, expected them to be prepared (--prepare)")
        ranges = [PromptRange(first, num_prompts, weight) for first, num_prompts, weight in files]
        return DataOrder(ranges, seed=config.seed, shuffle=config.data.shuffle)

    def _check_kind(self) -> None:
        found = self._sql.execute("PRAGMA application_id").fetchone()[0]
        version = self._sql.execute("PRAGMA user_version").fetchone()[0]
        empty = not self._sql.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if not empty and (found != APPLICATION_ID or version != SCHEMA_VERSION):
            self._sql.close()
            raise RunDirectoryError(
                f"{self.path}: found schema {version} of application {found:#x}, "
                f"expected schema {SCHEMA_VERSION} of a ledger"
            )

    @contextmanager
    def _mapped(self) -> Generator[None]:
        """SQLite's errors as RunDirectoryError."""
        try:
            yield
        except sqlite3.Error as error:
            raise RunDirectoryError(f"{self.path}: cannot be used: {error}") from error


def put_meta(sql: sqlite3.Connection, key: str, value: bytes) -> None:
    """Sets a value by name, inside a transaction."""
    sql.execute("INSERT OR REPLACE INTO meta VALUES (?,?)", (key, value))


def _statements(changes: Changes, evaluations: EvaluationChanges) -> list[tuple[str, list[tuple[object, ...]]]]:
    """What a call changed, as statements in order, each with its rows."""
    return [
        ("INSERT OR REPLACE INTO visits VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", [visit_row(v) for v in changes.visits]),
        ("DELETE FROM payloads WHERE visit = ?", [(number,) for number in changes.freed]),
        ("INSERT OR REPLACE INTO payloads VALUES (?,?)", list(changes.payloads.items())),
        (
            "INSERT OR REPLACE INTO evaluation_visits VALUES (?,?,?,?,?,?,?,?,?,?)",
            [evaluation_row(v) for v in evaluations.visits],
        ),
        ("DELETE FROM evaluation_visits WHERE number = ?", [(number,) for number in evaluations.dropped]),
        ("INSERT INTO evaluations (data) VALUES (?)", [(msgspec.msgpack.encode(e),) for e in evaluations.finished]),
    ]
