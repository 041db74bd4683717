"""The ledger's SQLite file: every change is one transaction, and a restart finds the state as it was stored.

WAL: a killed process loses nothing that was answered. A step that was committed also survives the loss of the machine:
`sync` first, then a transaction that is `durable`. What this does not do: what was answered after that may be lost with
the machine (not with the process); the file stays consistent, and those visits are leased again.
"""

import sqlite3
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
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
from learner.ledger.schema import APPLICATION_ID, FILE, SCHEMA_VERSION, SEGMENTS, TABLES
from learner.ledger.segments import Place, Segments
from learner.ledger.state import Ledger
from learner.ledger.visits import Changes, Head, Visit


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
                self._sql.executescript(
                    f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION}; {TABLES}"
                )
        self._places = self._read_places()
        self.segments = Segments(run_dir / SEGMENTS, self._places.values(), read_only=read_only)

    def close(self) -> None:
        """Closes the files."""
        self._sql.close()
        self.segments.close()

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Generator[sqlite3.Connection]:
        """All statements in the block are stored, or none; if `durable`, they survive the loss of the machine.

        Raises:
            RunDirectoryError: The disk is full, or the file cannot be written.
        """
        with self._mapped():
            self._sql.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
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

    def each(self, query: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, one at a time."""
        with self._mapped(), closing(self._sql.execute(query)) as cursor:
            yield from cursor

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

    def save(self, changes: Changes, evaluations: EvaluationChanges, *, durable: bool = False) -> None:
        """Stores what a call changed, as one transaction."""
        if not changes and not evaluations:
            return
        added = {visit: self.segments.append(payload) for visit, payload in changes.payloads.items()}
        gone = [visit for visit in changes.freed if visit in self._places]
        with self.transaction(durable=durable) as sql:
            if changes.head is not None:
                put_meta(sql, "head", msgspec.json.encode(changes.head))
            for statement, rows in _statements(changes.visits, gone, added, evaluations):
                if rows:
                    sql.executemany(statement, rows)
            if evaluations.visits:
                lowest = min(int(self.meta("lowest") or b"0"), *(v.number for v in evaluations.visits))
                put_meta(sql, "lowest", str(lowest).encode())
        self.segments.free([self._places.pop(visit) for visit in gone])
        self._places |= added

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

    def payload(self, visit: int) -> wire.ScoredGroup | None:
        """The scored group of a visit; None where it cannot be read as it was stored."""
        data = self.payload_bytes(visit)
        return None if data is None else msgspec.msgpack.decode(data, type=wire.ScoredGroup)

    def payload_bytes(self, visit: int) -> bytes | None:
        """The same, encoded."""
        return self.segments.read(self.where(visit))

    def where(self, visit: int) -> Place:
        """Where its payload is."""
        return self._places[visit]

    def prompt(self, row: int) -> wire.Prompt:
        """The prompt in a row."""
        return msgspec.msgpack.decode(self.prompt_bytes(row), type=wire.Prompt)

    def prompt_bytes(self, row: int) -> bytes:
        """The same, encoded."""
        return self.rows("SELECT data FROM prompts WHERE id = ?", row)[0][0]

    def num_cut_payloads(self) -> int:
        """Payloads that cannot be whole, by the sizes of their files; those that are freed meanwhile do not count."""
        before = self._read_places()
        cut = {visit: place for visit, place in before.items() if self.segments.is_cut(place)}
        after = self._read_places() if cut else {}
        return sum(after.get(visit) == place for visit, place in cut.items())

    def size_bytes(self) -> tuple[int, int]:
        """Bytes on disk: of the SQLite file with its log, and of the scored groups."""
        files = (self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal"))
        return sum(file.stat().st_size for file in files if file.exists()), self.segments.size_bytes()

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

        ended = self.each("SELECT number, state FROM visits_with_ends WHERE has_ended")
        live = self.rows(
            "SELECT * FROM visits WHERE number IN (SELECT number FROM visits_with_ends WHERE NOT has_ended)"
        )
        return Ledger(
            config,
            prompt_of,
            routes_check=check,
            head=self.head(),
            live=[visit_of(row, now) for row in live],
            ended=((number, wire.VisitState(state)) for number, state in ended),
        )

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

    def _read_places(self) -> dict[int, Place]:
        rows = self.rows("SELECT visit, segment, offset, size_bytes, checksum FROM payloads")
        return {visit: Place(*place) for visit, *place in rows}

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


def _statements(
    visits: list[Visit], gone: list[int], added: dict[int, Place], evaluations: EvaluationChanges
) -> list[tuple[str, list[tuple[object, ...]]]]:
    """What a call changed, as statements in order, each with its rows."""
    return [
        ("INSERT OR REPLACE INTO visits VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", [visit_row(v) for v in visits]),
        ("DELETE FROM payloads WHERE visit = ?", [(number,) for number in gone]),
        ("INSERT INTO payloads VALUES (?,?,?,?,?)", [(visit, *place) for visit, place in added.items()]),
        (
            "INSERT OR REPLACE INTO evaluation_visits VALUES (?,?,?,?,?,?,?,?,?,?)",
            [evaluation_row(v) for v in evaluations.visits],
        ),
        ("DELETE FROM evaluation_visits WHERE number = ?", [(number,) for number in evaluations.dropped]),
        ("INSERT INTO evaluations (data) VALUES (?)", [(msgspec.msgpack.encode(e),) for e in evaluations.finished]),
    ]
