"""Late completions: leases that are given back, groups of fewer completions, and the clocks that tell."""

import msgspec
import pytest

from common import wire
from common.config import Config
from common.learning import LossConfig
from common.sections import EvaluationConfig, LeaseConfig, SamplingConfig
from common.wire import LeaseKey, VisitState
from learner.ledger.evaluations import Evaluations
from learner.ledger.judgement import min_completions
from learner.ledger.state import Ledger
from learner.ledger.visits import Visit
from tests.learner.ledger.rules import MakeGroup, V, grant, make_ledger, train

CLOCKS = LeaseConfig(heartbeat_timeout_s=15, completion_timeout_s=40)
TRAIN_REST = LeaseConfig(late="train_rest")


def give_back(ledger: Ledger, visit: Visit, name: str = "generator-0", reason: str = "late") -> bool:
    return ledger.give_back(name, wire.Returned(visit.key, reason))


def test_a_lease_that_is_given_back_is_granted_first_and_its_attempt_counts() -> None:
    ledger = make_ledger()
    first, second = grant(ledger, 2)
    assert give_back(ledger, second)
    assert second.state is VisitState.WAITING
    assert second.reason == "generator-0 gave it back: late"
    assert ledger.budget(V[0]) - ledger.num_admitted == 3
    (again,) = grant(ledger)
    assert again.key == LeaseKey(second.number, 2)
    assert first.state is VisitState.LEASED


def test_only_the_holder_of_the_newest_attempt_gives_a_lease_back() -> None:
    ledger = make_ledger()
    (visit,) = grant(ledger)
    old = wire.Returned(visit.key, "late")
    assert not give_back(ledger, visit, name="generator-1")
    assert give_back(ledger, visit)
    assert not ledger.give_back("generator-0", old)
    (again,) = grant(ledger)
    assert not ledger.give_back("generator-0", old)
    assert again.state is VisitState.LEASED
    assert not ledger.give_back("generator-0", wire.Returned(LeaseKey(77, 1), "late"))
    assert not ledger.give_back("generator-0", wire.Returned(LeaseKey(-1, 1), "late"))


def test_a_group_that_was_given_back_is_refused_when_it_comes_all_the_same(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    (visit,) = grant(ledger)
    late = make_group(visit.key, V[0])
    give_back(ledger, visit)
    assert ledger.store(late, b"").reason == "attempt 1 is over: visit 0 is waiting"


def test_a_stored_group_cannot_be_given_back(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    (visit,) = grant(ledger)
    ledger.store(make_group(visit.key, V[0]), b"")
    assert not give_back(ledger, visit)
    assert visit.state is VisitState.SCORED


def test_beats_renew_a_lease_until_the_completions_deadline() -> None:
    """And for a heartbeat's timeout more, in which the generator's own news of it would come."""
    ledger = make_ledger(lease=CLOCKS)
    (visit,) = grant(ledger)
    key = visit.key
    for now in (10.0, 20.0, 30.0, 40.0, 50.0, 55.0):
        assert ledger.beat("generator-0", (key,), now) == ()
        assert ledger.expire(now) == 0
    assert ledger.expire(now=56.0) == 1
    assert visit.reason == "not complete after 40 s at generator-0, which did not give it back"
    assert ledger.beat("generator-0", (key,), 57.0) == (key,)


def test_a_finished_group_has_a_heartbeat_but_no_deadline_any_more() -> None:
    ledger = make_ledger(lease=CLOCKS)
    (visit,) = grant(ledger)
    key = visit.key
    for now in range(10, 200, 10):
        assert ledger.beat("generator-0", (key,), float(now), finished=(key,)) == ()
        assert ledger.expire(float(now)) == 0
    assert ledger.expire(206.0) == 1
    assert visit.reason == "generator-0 was silent for 15 s"


def test_a_finished_group_falls_behind_as_others_do(make_group: MakeGroup) -> None:
    ledger = make_ledger(lease=CLOCKS)
    (visit,) = grant(ledger)
    key = visit.key
    for version in V[:2]:
        assert ledger.beat("generator-0", (key,), 1.0, finished=(key,)) == ()
        train(ledger, make_group, version, version)
    assert ledger.beat("generator-0", (key,), 1.0, finished=(key,)) == (key,)
    assert visit.pinned


def test_a_new_attempt_is_not_finished_because_the_one_before_was() -> None:
    ledger = make_ledger(lease=CLOCKS)
    (visit,) = grant(ledger)
    ledger.beat("generator-0", (visit.key,), 10.0, finished=(visit.key,))
    give_back(ledger, visit)
    (again,) = grant(ledger, now=100.0)
    for now in (110.0, 120.0, 130.0, 140.0, 150.0):
        ledger.beat("generator-0", (again.key,), now)
    assert ledger.expire(155.0) == 0
    assert ledger.expire(156.0) == 1


def test_two_completions_are_the_least_and_only_where_late_ones_are_left_out() -> None:
    assert min_completions(Config(group_size=4)) == 4
    assert min_completions(Config(group_size=4, lease=TRAIN_REST)) == 2


@pytest.mark.parametrize(("num", "expected"), [(1, "2 to 4"), (5, "2 to 4")])
def test_a_group_of_too_few_or_too_many_goes_back(make_group: MakeGroup, num: int, expected: str) -> None:
    ledger = make_ledger(group_size=4, lease=TRAIN_REST)
    (visit,) = grant(ledger)
    verdict = ledger.store(make_group(visit.key, V[0], (1.0, 0.0, 1.0, 0.0, 1.0)[:num]), b"")
    assert verdict.reason == f"malformed: found {num} completions, expected {expected}"


def test_a_group_without_its_late_completions_is_taken_where_they_are_left_out(make_group: MakeGroup) -> None:
    strict, lenient = make_ledger(group_size=4), make_ledger(group_size=4, lease=TRAIN_REST)
    (visit,) = grant(strict)
    assert strict.store(make_group(visit.key, V[0]), b"").reason == "malformed: found 2 completions, expected 4"
    (visit,) = grant(lenient)
    assert lenient.store(make_group(visit.key, V[0]), b"").status == "stored"
    assert lenient.accounts()["scored"] == 1


def test_a_short_group_is_uniform_and_ungraded_as_others_are(make_group: MakeGroup) -> None:
    ledger = make_ledger(group_size=4, lease=TRAIN_REST, loss=LossConfig(filter_uniform=True))
    first, second = grant(ledger, 2)
    ledger.store(make_group(first.key, V[0], (0.0, 0.0, None)), b"")
    assert (first.state, first.reason) == (VisitState.FILTERED, "all graded completions are wrong")
    ledger.store(make_group(second.key, V[0], (1.0, None, None)), b"")
    assert second.reason == "1 of 3 completions graded, expected 2"


def test_two_completions_of_one_seed_are_no_group(make_group: MakeGroup) -> None:
    ledger = make_ledger(group_size=3)
    (visit,) = grant(ledger)
    scored = make_group(visit.key, V[0], (1.0, 0.0, 1.0))
    first, second, _ = scored.group.completions
    group = msgspec.structs.replace(scored.group, completions=(first, second, second))
    verdict = ledger.store(msgspec.structs.replace(scored, group=group), b"")
    assert verdict.reason == "malformed: found 1 completions with the seed of another, expected one each"


def test_the_learner_goes_on_when_a_pinned_prompt_is_late_and_without_it_when_it_always_is(
    make_group: MakeGroup,
) -> None:
    """It waits for each of the attempts that its window ends in, and for none after the last."""
    ledger = make_ledger(max_staleness=1, lease=LeaseConfig(max_attempts=3))
    (slow,) = grant(ledger)
    for version in V[:2]:
        train(ledger, make_group, version, version)
    assert slow.pinned
    assert slow.reason == "expired: sampled from 0.0 on, too stale at 0.2"
    for attempt, number in ((2, 2), (3, 4)):
        (again,) = grant(ledger, version=V[number])
        assert again.key == LeaseKey(slow.number, attempt)
        train(ledger, make_group, V[number], V[number])
        for visit in grant(ledger, 2, V[number + 1]):
            ledger.store(make_group(visit.key, V[number + 1]), b"")
        assert ledger.awaited_pins() == [slow]
        assert ledger.reserve(V[number + 1], 2) == []
        give_back(ledger, slow, reason="1 of 2 completions after 40 s, expected 2")
        batch = ledger.reserve(V[number + 1], 2)
        ledger.commit(V[number + 1], tuple(visit.number for visit in batch))
    assert slow.state is VisitState.QUARANTINED
    assert slow.reason == (
        "3 attempts used up, the last: generator-0 gave it back: 1 of 2 completions after 40 s, expected 2"
    )
    assert ledger.accounts()["quarantined"] == 1


def test_evaluations_are_given_back_by_the_same_rules_and_need_all_their_samples(make_group: MakeGroup) -> None:
    samples = EvaluationConfig(num_samples=3, sampling=SamplingConfig(temperature=1.0))
    limits = msgspec.structs.replace(CLOCKS, max_attempts=2, late="train_rest")
    evaluations = Evaluations(Config(evaluation=samples, lease=limits), [(10, "easy")])
    evaluations.ask(V[0], now=0.0)
    (visit,) = evaluations.grant("g", V[0], 1, now=0.0)
    assert not evaluations.give_back("h", wire.Returned(visit.key, "late"))
    assert evaluations.give_back("g", wire.Returned(visit.key, "late"))
    assert not evaluations.give_back("g", wire.Returned(visit.key, "late"))
    (again,) = evaluations.grant("g", V[0], 1, now=1.0)
    evaluations.beat("g", (again.key,), 60.0, finished=(again.key,))
    assert evaluations.expire(now=60.0) == 0
    short = make_group(again.key, V[0], (1.0, 1.0))
    assert evaluations.store(short, 1).reason == "malformed: found 2 completions, expected 3"
    assert [(e.num_failed, e.num_prompts) for e in evaluations.finished] == [(3, 1)]
