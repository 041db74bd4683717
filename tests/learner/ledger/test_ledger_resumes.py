"""The rules of resumes: lineages, what is served again, and which payloads are kept."""

import pytest

from common.errors import RefusedError
from common.learning import LearnerConfig
from common.versions import Version
from tests.learner.ledger.rules import MakeGroup, V, grant, make_ledger, train


def test_a_run_that_trained_nothing_begins_at_the_first_version_again(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    for visit in grant(ledger, 2):
        ledger.store(make_group(visit.key, V[0]), b"")
    ledger.reserve(V[0], 2)
    assert ledger.begin(None) == V[0]
    assert ledger.accounts()["scored"] == 2


def test_a_resume_opens_a_lineage_and_serves_again_what_was_trained_after_the_checkpoint(make_group: MakeGroup) -> None:
    ledger = make_ledger(max_staleness=4)
    kept = train(ledger, make_group)
    ledger.checkpoint(V[1])
    undone = train(ledger, make_group)
    assert ledger.begin(V[1], 1) == Version(1, 1)
    assert ledger.accounts()["trained"] == 2
    batch = [visit.number for visit in ledger.reserve(Version(1, 1), 2)]
    assert batch == undone
    assert not set(batch) & set(kept)
    assert ledger.commit(Version(1, 1), tuple(batch)) == 3


def test_a_resume_without_a_checkpoint_opens_a_lineage_at_the_start(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    train(ledger, make_group)
    assert ledger.begin(None) == Version(1, 0)
    assert ledger.accounts()["scored"] == 2


def test_commits_before_the_checkpoint_survive_repeated_resumes(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    train(ledger, make_group)
    train(ledger, make_group)
    ledger.checkpoint(V[2])
    assert ledger.begin(V[2], 2) == Version(1, 2)
    assert ledger.begin(V[2], 2) == Version(2, 2)
    train(ledger, make_group)
    ledger.checkpoint(Version(2, 3))
    assert ledger.begin(Version(2, 3), 3) == Version(3, 3)
    assert ledger.accounts()["trained"] == 6


def test_a_resume_from_an_abandoned_or_forgotten_version_is_refused(make_group: MakeGroup) -> None:
    ledger = make_ledger(max_staleness=4)
    for _ in range(3):
        train(ledger, make_group)
    ledger.checkpoint(V[1])
    for visit in grant(ledger, 2, V[3]):
        ledger.store(make_group(visit.key, V[3]), b"")
    assert ledger.reserve(V[3], 2)
    before = ledger.accounts()
    with pytest.raises(RefusedError, match="on the path"):
        ledger.begin(Version(0, 4), 4)
    assert (ledger.accounts(), ledger.track.current) == (before, V[3])
    ledger.begin(V[1], 1)
    with pytest.raises(RefusedError, match="on the path"):
        ledger.begin(V[3], 3)
    train(ledger, make_group)
    ledger.checkpoint(Version(1, 2))
    with pytest.raises(RefusedError, match="not kept"):
        ledger.begin(V[0], 0)


def test_a_resume_names_the_commit_that_the_ledger_has_for_its_version(make_group: MakeGroup) -> None:
    """Sequence numbers go on over lineages, so that a checkpoint is told from that of another run, or time."""
    ledger = make_ledger(max_staleness=4)
    for _ in range(3):
        train(ledger, make_group)
    ledger.begin(V[1], 1)
    train(ledger, make_group)
    assert ledger.track.sequence(Version(1, 2)) == 4
    before = ledger.accounts()
    with pytest.raises(RefusedError, match=r"found a resume from 1.2, commit 2, expected commit 4 of the ledger"):
        ledger.begin(Version(1, 2), 2)
    with pytest.raises(RefusedError, match=r"found a resume from 1.9, commit 11, .* path of 1.2, commit 4"):
        ledger.begin(Version(1, 9), 11)
    assert ledger.accounts() == before
    assert ledger.begin(Version(1, 2), 4) == Version(2, 2)
    assert ledger.begin(Version(2, 2), 4) == Version(3, 2), "no step since: the same weights"


def test_payloads_are_kept_back_to_the_oldest_kept_checkpoint(make_group: MakeGroup) -> None:
    ledger = make_ledger(learner=LearnerConfig(keep_checkpoints=2))
    first = train(ledger, make_group)
    ledger.checkpoint(V[1])
    assert ledger.drain().freed.isdisjoint(first)
    train(ledger, make_group)
    ledger.checkpoint(V[2])
    assert ledger.drain().freed == set(first)
    assert ledger.accounts()["trained"] == 4


def test_the_same_number_in_an_abandoned_lineage_is_another_version(make_group: MakeGroup) -> None:
    """Without lineages both groups would look fresh: their numbers are the same."""
    ledger = make_ledger(max_staleness=1)
    for _ in range(4):
        train(ledger, make_group)
    ledger.begin(None)
    for _ in range(4):
        train(ledger, make_group)
    assert ledger.track.current == Version(1, 4)
    abandoned, own = grant(ledger, 2, Version(1, 4))
    assert ledger.store(make_group(abandoned.key, V[4]), b"").status == "refused"
    assert ledger.store(make_group(own.key, Version(1, 4)), b"").status == "stored"


def test_a_generator_of_an_abandoned_lineage_gets_no_lease(make_group: MakeGroup) -> None:
    ledger = make_ledger(max_staleness=1)
    for _ in range(3):
        train(ledger, make_group)
    ledger.begin(None)
    assert ledger.budget(Version(1, 0)) == 4
    assert ledger.budget(V[3]) < 0
    assert grant(ledger, 10, V[3]) == []
