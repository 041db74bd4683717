"""A damaged file is found when the ledger starts, and by the audit: one line, exit 2."""

import sqlite3
from pathlib import Path

import pytest

from common.config import Config
from common.rendezvous import RunKeys
from learner.ledger.schema import FILE, SCHEMA_VERSION
from tests.learner.ledger.roles import MakeRun, command


def prepared(make_run: MakeRun) -> tuple[Path, Config]:
    run_dir, config = make_run()
    done = command(run_dir, "--prepare")
    assert done.returncode == 0, done.stderr
    return run_dir, config


def refusal(run_dir: Path, *options: str) -> str:
    """What the ledger's command says when it ends with code 2: one line."""
    ended = command(run_dir, *options)
    assert (ended.returncode, ended.stdout) == (2, ""), ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("sluice: ")
    return line


def page_of(file: Path, name: str) -> tuple[int, int]:
    """The size of a page, and the number of the first page of a table or an index."""
    sql = sqlite3.connect(file)
    size = sql.execute("PRAGMA page_size").fetchone()[0]
    page = sql.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()[0]
    sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    sql.close()
    return size, page


@pytest.mark.parametrize("name", ["prompts", "prompts_by_hash", "meta"])  # the index is read by no query of a ledger
def test_a_damaged_page_in_the_middle_is_found(make_run: MakeRun, name: str) -> None:
    run_dir, _ = prepared(make_run)
    file = run_dir / FILE
    size, page = page_of(file, name)
    with file.open("r+b") as data:
        data.seek((page - 1) * size)
        data.write(b"\x5a" * size)
    for options in ((), ("--audit",)):
        assert str(file) in refusal(run_dir, *options)


def test_a_cut_file_is_found(make_run: MakeRun) -> None:
    run_dir, _ = prepared(make_run)
    file = run_dir / FILE
    size, _ = page_of(file, "prompts")
    with file.open("r+b") as data:
        data.truncate(file.stat().st_size - 2 * size)
    for options in ((), ("--audit",)):
        assert str(file) in refusal(run_dir, *options)


def test_a_file_of_another_run_another_schema_or_no_database_is_refused(make_run: MakeRun) -> None:
    run_dir, _ = prepared(make_run)
    file = run_dir / FILE
    sql = sqlite3.connect(file)
    sql.execute("INSERT OR REPLACE INTO meta VALUES ('run', ?)", (b"another",))
    sql.commit()
    assert "found the ledger of another run" in refusal(run_dir)
    sql.execute("UPDATE meta SET value = ? WHERE key = 'run'", (RunKeys.load(run_dir).public.encode(),))
    sql.commit()
    sql.execute("PRAGMA user_version=99")
    sql.close()
    for options in ((), ("--audit",), ("--prepare",)):
        assert f"found schema 99 of application 0x511ce001, expected schema {SCHEMA_VERSION}" in refusal(
            run_dir, *options
        )
    file.write_bytes(b"no database, but long enough to be looked at" * 200)
    for options in ((), ("--audit",), ("--prepare",)):
        assert "file is not a database" in refusal(run_dir, *options)


def test_a_prompt_file_that_changed_since_the_run_began_is_refused(make_run: MakeRun) -> None:
    run_dir, config = prepared(make_run)
    sql = sqlite3.connect(run_dir / FILE)
    values = (0, 1, "trained", "r", 1, "", "[0,0]", 0.0, 0, 0, "[]", "[0,0]")
    sql.execute("INSERT INTO visits VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", values)
    sql.commit()
    sql.close()
    (file,) = config.data.train_files
    path, before = Path(file.path), Path(file.path).read_text()
    path.write_text(before.replace('"0+0="', '"0-0="'))
    assert f"{path}: found other content than when the run began" in refusal(run_dir, "--prepare")
    path.write_text(before)
    assert command(run_dir, "--prepare").returncode == 0
