"""The ledger's SQLite file: kinds and schemas, transactions, the log, and values by name.

WAL: a killed process loses nothing that was stored. What this does not do: what was stored since the log was last
written through to the disk may be lost with the machine; the file stays consistent.
"""

import sqlite3
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from common.errors import RunDirectoryError
from learner.ledger.schema import APPLICATION_ID, FILE, SCHEMA_VERSION, TABLES


class Database:
    """The file of one run.

    Attributes:
        path: Of the file.
    """

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

    def close(self) -> None:
        """Closes the file."""
        self._sql.close()

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """All statements in the block are stored, or none.

        Raises:
            RunDirectoryError: The disk is full, or the file cannot be written.
        """
        with self._mapped(), self._sql:
            self._sql.execute("BEGIN IMMEDIATE")
            yield self._sql

    def keep_log_short(self) -> Callable[[], int]:
        """What moves the log into the file, and returns its bytes; any thread may call it, which waits for the disk.

        From now on nothing else does, but `cut_log`. It raises RunDirectoryError where the disk fails or is full.
        """
        with self._mapped():
            self._sql.execute("PRAGMA wal_autocheckpoint=0")
        return self._move_log

    def cut_log(self) -> None:
        """Moves the log into the file and begins it anew; nothing else can be stored meanwhile."""
        with self._mapped():
            self._sql.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _move_log(self) -> int:
        with self._mapped(), closing(sqlite3.connect(self.path, isolation_level=None)) as sql:
            sql.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        return self.log.stat().st_size if self.log.exists() else 0

    @property
    def log(self) -> Path:
        """Of SQLite, where changes are first."""
        return self.path.with_name(f"{FILE}-wal")

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
