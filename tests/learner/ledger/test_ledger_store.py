"""The file: identity, schema, crashes, and the audit."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from common import wire
from common.config import Config
from common.errors import RunDirectoryError
from common.sections import LeaseConfig
from common.versions import Version
from learner.ledger.audit import audit
from learner.ledger.judgement import ALL_RIGHT, ALL_WRONG
from learner.ledger.order import DataOrder, PromptRange
from learner.ledger.prompts import prepare
from learner.ledger.schema import FILE
from learner.ledger.store import Store

MakeRun = Callable[..., tuple[Path, Config]]
MakeGroup = Callable[..., wire.ScoredGroup]


def test_a_file_of_another_run_schema_or_kind_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert [store.identify("a"), store.identify("a")] == [1, 2]
    with pytest.raises(RunDirectoryError, match="another run"):
        store.identify("b")
    store.close()
    sql = sqlite3.connect(tmp_path / FILE)
    sql.execute("PRAGMA user_version=99")
    sql.close()
    with pytest.raises(RunDirectoryError, match="found schema 99"):
        Store(tmp_path)
    (tmp_path / FILE).write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(RunDirectoryError, match="cannot be used"):
        Store(tmp_path)
    with pytest.raises(RunDirectoryError, match="cannot be used"):
        Store(tmp_path / "nowhere")


def test_a_failed_transaction_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail() -> None:
        with store.transaction() as sql:
            sql.execute("INSERT INTO members VALUES ('a', 'verifier', '')")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert store.rows("SELECT * FROM members") == []


def test_the_state_is_read_back_as_it_was(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir, config = make_run(lease=LeaseConfig(heartbeat_timeout_s=15))
    store = Store(run_dir)
    prepare(store, config)
    ledger, evaluations = store.ledger(config, 0.0), store.evaluations(config, 0.0)
    version = ledger.begin(None)
    evaluations.ask(version, 0.0)
    ledger.grant("g", version, 3, 0.0)
    held_out = evaluations.grant("g", version, 3, 0.0)
    evaluations.store(make_group(held_out[0].key, version, (1.0,)), 1)
    scored = ledger.visits(wire.VisitState.LEASED)[0]
    group = make_group(scored.key, version)
    ledger.store(group, wire.encode(group))
    store.save(ledger.drain(), evaluations.drain())
    store.close()

    again = Store(run_dir)
    ledger, evaluations = again.ledger(config, 5.0), again.evaluations(config, 5.0)
    assert ledger.accounts()["leased"] == 2
    assert again.payload(scored.number) == group
    assert evaluations.num_pending == 3
    assert len(evaluations.grant("h", version, 9, 5.0)) == 1
    assert ledger.expire(now=15.0) == 0
    assert ledger.expire(now=21.0) == 2
    assert evaluations.expire(now=21.0) == 3
    assert audit(run_dir).wrong == []


def test_the_audit_names_what_does_not_hold(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir, config = make_run()
    store = Store(run_dir)
    prepare(store, config)
    ledger = store.ledger(config, 0.0)
    version = ledger.begin(None)
    visit, _ = ledger.grant("generator-7", version, 2, 0.0)
    group = make_group(visit.key, version)
    ledger.store(group, wire.encode(group))
    store.save(ledger.drain(), store.evaluations(config, 0.0).drain())
    found = audit(run_dir)
    assert found.wrong == []
    assert "scored       1" in found.lines
    assert any(line.startswith("oldest lease: visit 1, attempt 1, generator-7") for line in found.lines)
    assert "waiting for: the learner to publish version 0.0" in found.lines
    with store.transaction() as sql:
        sql.execute("DELETE FROM payloads")
        sql.execute("DELETE FROM visits WHERE number = 1")
    assert audit(run_dir).wrong == [
        "1 visits without a payload that a step needs",
        "the states sum to 1, expected 2 visits handed out",
    ]


def test_files_are_interleaved_by_weight_and_each_epoch_has_an_order_of_its_own() -> None:
    files = [PromptRange(1, 10, 3.0), PromptRange(11, 10, 1.0)]
    order = DataOrder(files, seed=0, shuffle=True)
    prompts = [order.prompt(position) for position in range(80)]
    for end in range(1, 81):
        num_first = sum(prompt <= 10 for prompt in prompts[:end])
        assert abs(num_first - 0.75 * end) <= 1
    first = [prompt for prompt in prompts if prompt <= 10]
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(1, 11))
    assert first[:10] != first[10:20]
    assert [DataOrder(files, seed=0, shuffle=True).prompt(position) for position in (0, 40, 79)] == [
        prompts[0],
        prompts[40],
        prompts[79],
    ]
    assert [order.prompt(position) for position in range(80)] == prompts
    other = DataOrder(files, seed=1, shuffle=True)
    assert [other.prompt(position) for position in range(80)] != prompts


def test_without_shuffling_the_order_is_the_files() -> None:
    order = DataOrder([PromptRange(1, 3, 1.0)], seed=0, shuffle=False)
    assert [order.prompt(position) for position in range(5)] == [1, 2, 3, 1, 2]


def test_a_manifest_and_members_outlive_the_process(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = wire.Manifest(
        version=Version(1, 2), publishers=("tcp://p",), size_bytes=3, probe_token_ids=b"1", probe_logprobs=b"2"
    )
    store.save_manifest(manifest)
    store.save_member("verifier-0", "verifier", "tcp://x")
    store.save_member("generator-0", "generator", "")
    store.drop_member("generator-0")
    store.close()
    again = Store(tmp_path)
    assert again.manifest() == manifest
    assert again.members() == [("verifier-0", "verifier", "tcp://x")]


def test_a_restart_takes_no_group_that_waits_for_a_verifier_for_a_late_one(make_run: MakeRun) -> None:
    """Which leases are finished is not stored: the deadline runs on once the holder says that one is not."""
    run_dir, config = make_run(lease=LeaseConfig(heartbeat_timeout_s=15, completion_timeout_s=40))
    store = Store(run_dir)
    prepare(store, config)
    ledger = store.ledger(config, 0.0)
    keys = tuple(visit.key for visit in ledger.grant("generator-0", ledger.begin(None), 2, 0.0))
    ledger.beat("generator-0", keys, 90.0, finished=keys[:1])
    store.save(ledger.drain(), store.evaluations(config, 0.0).drain())
    again = store.ledger(config, 100.0)
    assert again.expire(114.0) == 0
    assert again.beat("generator-0", keys, 115.0, finished=keys[:1]) == ()
    assert again.expire(115.0) == 1
    assert again.beat("generator-0", keys, 116.0, finished=keys[:1]) == keys[1:]


def test_quarantined_prompts_are_named_with_their_reasons(make_run: MakeRun) -> None:
    run_dir, config = make_run(lease=LeaseConfig(max_attempts=1), max_staleness=20)
    store = Store(run_dir)
    prepare(store, config)
    ledger = store.ledger(config, 0.0)
    for visit in ledger.grant("generator-0", ledger.begin(None), 22, 0.0):
        ledger.give_back("generator-0", wire.Returned(visit.key, "too slow"))
    store.save(ledger.drain(), store.evaluations(config, 0.0).drain())
    found = audit(run_dir)
    assert found.wrong == []
    named = [line for line in found.lines if line.startswith("quarantined:")]
    assert len(named) == 21
    prompt = store.prompt(store.rows("SELECT prompt FROM visits WHERE number = 21")[0][0]).id
    reason = "1 attempts used up, the last: generator-0 gave it back: too slow"
    assert named[0] == f"quarantined: visit 21 ({prompt}): {reason}"
    assert named[-1] == "quarantined: 2 more"


def test_filtered_visits_are_counted_by_reason(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir, config = make_run(group_size=3, max_staleness=4)
    store = Store(run_dir)
    prepare(store, config)
    ledger = store.ledger(config, 0.0)
    version = ledger.begin(None)
    outcomes = [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.0, None, 0.0), (1.0, 0.0, 0.0)]
    for lease, correct in zip(ledger.grant("generator-0", version, 4, 0.0), outcomes, strict=True):
        ledger.store(make_group(lease.key, version, correct), b"")
    store.save(ledger.drain(), store.evaluations(config, 0.0).drain())
    assert store.filtered() == {ALL_RIGHT: 1, ALL_WRONG: 2}


def test_a_new_session_finds_nobody_in_the_run_and_nothing_published(tmp_path: Path) -> None:
    """Weights of a session before are gone, and its verifiers are dead: nobody may be sent there."""
    store = Store(tmp_path)
    store.save_member("verifier-0", "verifier", "tcp://127.0.0.1:1")
    store.save_manifest(
        wire.Manifest(
            version=Version(0, 3), publishers=("tcp://gone",), size_bytes=1, probe_token_ids=b"", probe_logprobs=b""
        )
    )
    store.begin_session()
    assert store.members() == []
    assert store.manifest() is None
