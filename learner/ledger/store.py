"""The ledger on disk: every change is one transaction, and a restart finds the state as it was stored.

The accounts are in a SQLite file, the scored groups in segment files beside it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from common import wire
from common.config import Config
from common.errors import DataError, RunDirectoryError
from learner.ledger.database import Database, put_meta
from learner.ledger.evaluations import EvaluationChanges, Evaluations
from learner.ledger.order import DataOrder, Epochs, PromptRange
from learner.ledger.routes import routes_check
from learner.ledger.rows import evaluation_row, evaluation_visit_of, visit_of, visit_row
from learner.ledger.schema import SEGMENTS
from learner.ledger.segments import Place, Segments, sync_files
from learner.ledger.state import Ledger
from learner.ledger.visits import Changes, Head, Visit


class Store(Database):
    """The files of one run.

    Attributes:
        segments: Those of the scored groups.
    """

    def __init__(self, run_dir: Path, *, read_only: bool = False) -> None:
        """Opens the run's files, or makes them.

        Raises:
            RunDirectoryError: They are not a ledger's, of another schema, broken, or cannot be written.
        """
        super().__init__(run_dir, read_only=read_only)
        self._places = self._read_places()
        self.segments = Segments(run_dir / SEGMENTS, self._places.values(), read_only=read_only)

    def check_whole(self) -> None:
        """Reads every page: about a second a gigabyte that is in the page cache, else what the disk takes.

        Raises:
            RunDirectoryError: The file is damaged.
        """
        if (found := self.rows("PRAGMA quick_check(1)")[0][0]) != "ok":
            raise RunDirectoryError(f"{self.path}: found a damaged file ({found}), expected a whole one")

    def close(self) -> None:
        """Closes the files."""
        super().close()
        self.segments.close()

    def sync(self) -> Callable[[], None]:
        """What makes all that is stored by now survive the loss of the machine; any thread may call it, which waits.

        It raises RunDirectoryError where the disk fails.
        """
        return partial(sync_files, [*self.segments.take_unsynced(), self.log])  # the log speaks of the groups

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
        added = {visit: self.segments.append(payload) for visit, payload in changes.payloads.items()}
        gone = [visit for visit in changes.freed if visit in self._places]
        with self.transaction() as sql:
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
        return sum(f.stat().st_size for f in (self.path, self.log) if f.exists()), self.segments.size_bytes()

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

    def epochs(self) -> Epochs:
        """Counts epochs of the prompts to train on."""
        files = self.rows("SELECT source, num_prompts, weight FROM files WHERE split = 'train' ORDER BY id")
        return Epochs({name: PromptRange(0, num_prompts, weight) for name, num_prompts, weight in files})

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
