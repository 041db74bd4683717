"""Which checkpoints a run may fall back to, and what the ledger then serves: real checkpoints, real rules."""

from pathlib import Path

import pytest

from common.errors import RefusedError
from common.learning import LearnerConfig
from common.rendezvous import RunKeys
from common.versions import Version
from learner.checkpoints import Checkpoints
from learner.ranks import Ranks
from learner.saved import directories
from tests.learner.ledger.rules import MakeGroup, V, grant, make_ledger, train
from tests.learner.saves import Weights, flip_a_bit, make_config, saved


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("num_damaged", [0, 1, 2, 3])
def test_a_run_falls_back_as_far_as_checkpoints_are_kept_and_no_further(
    keep: int, num_damaged: int, make_group: MakeGroup, tmp_path: Path
) -> None:
    """The best and those of `keep_every` are there for people: the payloads behind them are gone."""
    RunKeys.create(tmp_path)
    config = make_config(tmp_path, keep_checkpoints=keep, keep_every=2)
    ledger = make_ledger(max_staleness=8, learner=LearnerConfig(keep_checkpoints=keep))
    checkpoints, trained = Checkpoints(config, tmp_path, Ranks()), list[list[int]]()
    for number in range(1, 7):
        trained.append(train(ledger, make_group))
        saved(checkpoints, number)
        checkpoints.mark_best(V[1], 0.9)
        ledger.checkpoint(V[number])
    whole = directories(tmp_path / "checkpoints")
    assert {1, 2, 4, 6} <= {int(path.name[-1]) for path in whole}
    for path in whole[len(whole) - num_damaged :]:
        flip_a_bit(path / "megatron" / ".metadata")
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    point = checkpoints.load_newest(Weights())
    assert point is not None
    if num_damaged >= keep:
        with pytest.raises(RefusedError, match=f"expected 0.{7 - keep} or later: older are not kept"):
            ledger.begin(point.version, point.sequence)
        return
    assert point.version == V[6 - num_damaged]
    version = ledger.begin(point.version, point.sequence)
    assert version == Version(1, 6 - num_damaged)
    for undone in trained[6 - num_damaged :]:
        assert ledger.track.current is not None
        assert [visit.number for visit in ledger.reserve(ledger.track.current, 2)] == undone
        ledger.commit(ledger.track.current, tuple(undone))


def test_a_run_of_which_everything_is_kept_may_begin_again(make_group: MakeGroup) -> None:
    ledger = make_ledger(max_staleness=8, learner=LearnerConfig(keep_checkpoints=2))
    trained = [train(ledger, make_group) for _ in range(2)]
    ledger.checkpoint(V[2])
    version = ledger.begin(None)
    assert version == Version(1, 0)
    assert [visit.number for visit in ledger.reserve(version, 2)] == trained[0]


def test_a_step_is_repeated_with_its_groups_though_more_stale_ones_came_in_meanwhile(make_group: MakeGroup) -> None:
    ledger = make_ledger(max_staleness=4)
    train(ledger, make_group)
    ledger.checkpoint(V[1])
    late = grant(ledger, 2, V[0])
    undone = [train(ledger, make_group), train(ledger, make_group)]
    for visit in late:
        assert ledger.store(make_group(visit.key, V[0]), b"").status == "stored"
    version = ledger.begin(V[1], 1)
    served = []
    for _ in range(3):
        served.append([visit.number for visit in ledger.reserve(version, 2)])
        ledger.begin(version, ledger.track.sequence(version))  # a reserved batch is served again, too
        assert ledger.track.current is not None
        version = ledger.track.current
        assert [visit.number for visit in ledger.reserve(version, 2)] == served[-1]
        ledger.commit(version, tuple(served[-1]))
        version = version.next()
    assert served == [*undone, [visit.number for visit in late]]


def test_a_ledger_that_is_older_than_the_checkpoint_is_refused(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    train(ledger, make_group)
    before = ledger.head()
    with pytest.raises(RefusedError, match=r"knows of 3 visits, expected at most the 2 .*: the ledger is older than"):
        ledger.begin(V[1], 1, 3)
    assert ledger.head() == before
    assert ledger.begin(V[1], 1, 2) == Version(1, 1)
