"""Stored groups on disk: kept, freed, found damaged, and whole after a crash at any moment."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common import wire
from common.config import Config
from learner.ledger import segments
from learner.ledger.audit import audit
from learner.ledger.prompts import prepare
from learner.ledger.schema import FILE, SEGMENTS
from learner.ledger.segments import Segments
from learner.ledger.store import Store
from tests.clocks import PATIENCE_S
from tests.learner.ledger.roles import ROOT, Fleet, Learner, serving

MakeRun = Callable[..., tuple[Path, Config]]
MakeGroup = Callable[..., wire.ScoredGroup]


def test_what_is_appended_is_read_back_and_a_file_goes_when_nothing_in_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 250)
    kept = Segments(tmp_path / "groups", [])
    payloads = [bytes([number]) * 100 for number in range(8)]
    places = [kept.append(payload) for payload in payloads]
    assert [place.segment for place in places] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert [kept.read(place) for place in places] == payloads
    assert kept.size_bytes() == 800
    kept.free(places[:2])
    assert kept.size_bytes() == 800
    kept.free(places[2:3])
    assert kept.size_bytes() == 500
    kept.free(places[6:])
    assert kept.size_bytes() == 500, "the newest file is appended to"
    kept.append(b"x" * 100)
    assert [path.name for path in sorted((tmp_path / "groups").iterdir())] == ["000002.groups", "000003.groups"]


def test_another_process_appends_to_no_file_of_the_one_before_and_removes_what_nobody_needs(tmp_path: Path) -> None:
    before = Segments(tmp_path / "groups", [])
    place = before.append(b"needed")
    before.close()
    stray = tmp_path / "groups" / "000009.groups"
    stray.write_bytes(b"a payload whose transaction never ended")
    after = Segments(tmp_path / "groups", [place])
    assert not stray.exists()
    assert [path.name for path in after.take_unsynced()] == ["000001.groups"], "the one before may have synced none"
    assert after.append(b"new").segment == 10
    assert after.read(place) == b"needed"
    reading = Segments(tmp_path / "groups", [], read_only=True)
    assert reading.size_bytes() == 9, "an audit removes nothing"


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_payload_that_is_not_as_it_was_is_never_served(tmp_path: Path, damage: str) -> None:
    kept = Segments(tmp_path, [])
    first, second = kept.append(b"first"), kept.append(b"second")
    _damage(tmp_path / "000001.groups", damage)
    assert kept.read(second) is None
    assert (kept.read(first) == b"first") == (damage != "gone")
    assert kept.is_cut(second) == (damage != "flip")


def _damage(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content)


def test_a_group_that_is_damaged_on_disk_is_sampled_again_and_the_rest_of_its_batch_is_trained(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    run_dir, config = make_run(max_staleness=2)

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            fleet, learner = Fleet(run_dir, client, make_group), Learner(client, config)
            await fleet.join()
            await learner.begin()
            assert await fleet.work(learner.version, room=2) == 2
            (path,) = (run_dir / SEGMENTS).iterdir()
            _damage(path, "flip")
            assert (await learner.reserve()).groups == ()
            assert (await client.ask(wire.Status(), wire.StatusReport, deadline_s=PATIENCE_S)).accounts["waiting"] == 1
            assert await fleet.work(learner.version, room=1) == 1
            batch = await learner.reserve()
            await learner.commit(batch)
            assert sorted(learner.trained) == [0, 1]
            assert fleet.stored == {0: 1, 1: 2}

    asyncio.run(scenario())
    assert audit(run_dir).wrong == []


def test_the_file_is_consistent_wherever_a_crash_cuts_its_log(
    make_run: MakeRun, make_group: MakeGroup, tmp_path: Path
) -> None:
    """The log of transactions, cut at each of many bytes: what a lost machine leaves."""
    run_dir, config = make_run(max_staleness=3)
    store = Store(run_dir)
    prepare(store, config)
    ledger = store.ledger(config, 0.0)
    nothing = store.evaluations(config, 0.0)
    version = ledger.begin(None)
    num_trained = 0
    for _ in range(6):
        for visit in ledger.grant("generator-0", version, 3, 0.0):
            group = make_group(visit.key, version)
            ledger.store(group, wire.encode(group))
            store.save(ledger.drain(), nothing.drain())
        batch = ledger.reserve(version, 2)
        store.save(ledger.drain(), nothing.drain())
        ledger.commit(version, tuple(visit.number for visit in batch))
        store.save(ledger.drain(), nothing.drain())
        version, num_trained = version.next(), num_trained + 2
    log = (run_dir / f"{FILE}-wal").read_bytes()
    found: set[int] = set()
    cuts = random.Random(0).sample(range(len(log)), 60)
    for cut in (*sorted(cuts), len(log)):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run_dir, copy)
        (copy / f"{FILE}-shm").unlink(missing_ok=True)
        (copy / f"{FILE}-wal").write_bytes(log[:cut])
        opened = Store(copy)
        if opened.meta("prepared") is not None:
            found.add(opened.ledger(config, 0.0).accounts()["trained"])
        opened.close()
        assert audit(copy).wrong == []
    assert {0, num_trained} <= found
    assert len(found) > 3


_KILLED = """
import sys
from pathlib import Path
from common import wire
from common.layout import read_resolved
from common.versions import Version
from learner.ledger.store import Store
from tests.learner.ledger.rules import scored_group

run_dir = Path(sys.argv[1])
config, store = read_resolved(run_dir), Store(run_dir)
ledger, evaluations = store.ledger(config, 0.0), store.evaluations(config, 0.0)
version = ledger.track.current or ledger.begin(None)

def save():
    store.save(ledger.drain(), evaluations.drain())

while True:
    ledger.free("generator-0")
    for visit in ledger.grant("generator-0", version, 4, 0.0):
        group = scored_group(visit.key, (version,), (1.0, 0.0))
        ledger.store(group, wire.encode(group))
        save()
        print("stored", visit.number, flush=True)
    batch = ledger.reserve(version, 2)
    save()
    ledger.commit(version, tuple(v.number for v in batch))
    save()
    print("trained", *(v.number for v in batch), flush=True)
    version = version.next()
    if version.number % 5 == 0:
        ledger.checkpoint(version)
        save()
"""


def test_a_process_that_is_killed_at_any_moment_loses_nothing_that_it_said(make_run: MakeRun) -> None:
    run_dir, config = make_run(max_staleness=2)
    store = Store(run_dir)
    prepare(store, config)
    store.close()
    said: dict[int, str] = {}
    draw = random.Random(0)
    for _ in range(8):
        output = _run_and_kill(run_dir, draw.randrange(1, 60))
        for word, *visits in map(str.split, output):
            said |= {int(visit): word for visit in visits}
        assert audit(run_dir).wrong == []
        store = Store(run_dir, read_only=True)
        states = dict(store.rows("SELECT number, state FROM visits"))
        store.close()
        for visit, word in said.items():
            assert states[visit] in ({"scored", "reserved", "trained"} if word == "stored" else {"trained"}), visit
    assert list(said.values()).count("trained") > 50


def _run_and_kill(run_dir: Path, num_lines: int) -> list[str]:
    """The lines that it said before it was killed: at any moment after so many."""
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(run_dir)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first = [process.stdout.readline() for _ in range(num_lines)]
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().splitlines()
    process.stdout.close()
    assert process.wait(PATIENCE_S) == -signal.SIGKILL
    return [*first, *rest]
