"""The rules of the state machine, one by one."""

import msgspec
import pytest

from common import wire
from common.config import Config
from common.errors import RefusedError
from common.learning import LossConfig
from common.routes import RouteShape, routes_reason
from common.sections import LeaseConfig
from common.versions import Version
from common.wire import LeaseKey, VisitState
from learner.ledger.state import Ledger
from tests.learner.ledger.rules import MakeGroup, V, grant, make_ledger, train


def test_admission_ends_at_the_budget_of_the_engines_version() -> None:
    ledger = make_ledger()
    assert len(grant(ledger, room=10)) == 4
    assert grant(ledger) == []
    assert sum(ledger.accounts().values()) == 4


def test_nothing_is_granted_before_the_learner_begins() -> None:
    config = Config(group_size=2, groups_per_step=2, updates_per_step=1)
    assert grant(Ledger(config, lambda n: (n, "")), room=10) == []


def test_staleness_zero_admits_exactly_one_batch_a_version(make_group: MakeGroup) -> None:
    ledger = make_ledger(max_staleness=0)
    for number in range(3):
        visits = grant(ledger, 10, V[number])
        assert len(visits) == 2
        for visit in visits:
            ledger.store(make_group(visit.key, V[number]), b"")
        assert grant(ledger, 10, V[number]) == []
        batch = ledger.reserve(V[number], 2)
        assert grant(ledger, 10, V[number]) == []
        ledger.commit(V[number], tuple(v.number for v in batch))
        assert grant(ledger, 10, V[number]) == []


def test_a_filtered_group_frees_its_place(make_group: MakeGroup) -> None:
    ledger = make_ledger(max_staleness=0)
    first, _ = grant(ledger, 10)
    verdict = ledger.store(make_group(first.key, V[0], (1.0, 1.0)), b"")
    assert verdict.status == "stored"
    assert ledger.accounts()["filtered"] == 1
    assert len(grant(ledger, 10)) == 1


def test_a_uniform_group_is_scored_where_filtering_is_off(make_group: MakeGroup) -> None:
    ledger = make_ledger(loss=LossConfig(filter_uniform=False))
    (visit,) = grant(ledger)
    ledger.store(make_group(visit.key, V[0], (1.0, 1.0)), b"")
    assert ledger.accounts()["scored"] == 1


def test_a_prompt_outside_the_limits_ends_as_rejected_when_its_turn_comes() -> None:
    ledger = make_ledger(groups_per_step=8, max_staleness=0)
    assert [visit.number for visit in grant(ledger, 8)] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert ledger.accounts()["rejected"] == 1


def test_a_result_is_stored_once_and_a_duplicate_after_that(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    (visit,) = grant(ledger)
    group = make_group(visit.key, V[0])
    assert [ledger.store(group, b"").status for _ in range(2)] == ["stored", "duplicate"]


def test_a_late_result_of_an_old_attempt_is_refused(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    (visit,) = grant(ledger)
    late = make_group(visit.key, V[0])
    assert ledger.expire(now=16.0) == 1
    assert ledger.store(late, b"").status == "refused"
    (again,) = grant(ledger, now=17.0)
    assert again.key == LeaseKey(visit.number, 2)
    assert ledger.store(late, b"").status == "refused"
    assert ledger.store(make_group(again.key, V[0]), b"").status == "stored"
    assert ledger.store(late, b"").status == "duplicate"


def test_a_result_of_a_visit_that_was_never_handed_out_is_refused(make_group: MakeGroup) -> None:
    assert make_ledger().store(make_group(LeaseKey(7, 1), V[0]), b"").status == "refused"


def test_a_group_of_another_size_or_lineage_is_refused_and_its_prompt_goes_back(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    (visit,) = grant(ledger)
    assert "3 completions" in ledger.store(make_group(visit.key, V[0], (1.0, 0.0, 0.0)), b"").reason
    (visit,) = grant(ledger)
    assert "unknown lineage" in ledger.store(make_group(visit.key, Version(3, 0)), b"").reason
    (visit,) = grant(ledger)
    short = msgspec.structs.replace(make_group(visit.key, V[0]), grades=())
    assert "0 grades" in ledger.store(short, b"").reason
    assert grant(ledger)[0].key == LeaseKey(0, 4)


def test_a_group_with_one_graded_completion_goes_back_once_then_is_quarantined(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    (visit,) = grant(ledger)
    assert ledger.store(make_group(visit.key, V[0], (1.0, None)), b"").status == "refused"
    (again,) = grant(ledger)
    assert again.number == visit.number
    ledger.store(make_group(again.key, V[0], (None, 1.0)), b"")
    assert ledger.accounts()["quarantined"] == 1
    assert "second time" in again.reason


def test_a_visit_is_quarantined_when_its_attempts_are_used_up() -> None:
    ledger = make_ledger(lease=LeaseConfig(max_attempts=3))
    visits = []
    for attempt in range(3):
        visits += grant(ledger, now=100.0 * attempt)
        assert visits[-1].key == LeaseKey(0, attempt + 1)
        ledger.expire(now=100.0 * attempt + 50)
    assert ledger.accounts()["quarantined"] == 1
    assert visits[-1].reason.startswith("3 attempts used up, the last: generator-0 was silent")


def test_a_beat_of_another_generator_renews_nothing() -> None:
    ledger = make_ledger()
    (visit,) = grant(ledger)
    assert ledger.beat("generator-1", (visit.key,), 10.0) == (visit.key,)
    assert ledger.expire(now=16.0) == 1


def test_the_leases_of_a_replaced_process_are_free_at_once() -> None:
    ledger = make_ledger()
    grant(ledger, 2)
    assert ledger.free("generator-1") == 0
    assert ledger.free("generator-0") == 2
    assert ledger.accounts()["waiting"] == 2


def test_a_lease_is_cancelled_when_its_oldest_possible_token_falls_behind(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    (slow,) = grant(ledger)
    key = slow.key
    train(ledger, make_group, V[0], V[0])
    assert ledger.beat("generator-0", (key,), 1.0) == ()
    train(ledger, make_group, V[1], V[1])
    assert ledger.beat("generator-0", (key,), 1.0) == (key,)
    assert slow.pinned
    assert slow.state is VisitState.WAITING


def test_a_group_that_is_too_stale_on_arrival_is_refused_and_comes_back_pinned(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    train(ledger, make_group)
    (visit,) = grant(ledger, version=V[1])
    train(ledger, make_group)
    verdict = ledger.store(make_group(visit.key, V[0]), b"")
    assert verdict.status == "refused"
    assert "expired" in verdict.reason
    assert visit.pinned
    assert grant(ledger, version=V[2])[0] is visit


def test_a_scored_group_that_expires_in_the_queue_is_not_trained(make_group: MakeGroup) -> None:
    ledger = make_ledger(max_staleness=2)
    for visit in grant(ledger, 3):
        ledger.store(make_group(visit.key, V[0]), b"")
    ledger.commit(V[0], tuple(v.number for v in ledger.reserve(V[0], 2)))
    train(ledger, make_group, V[1], V[1])
    assert ledger.accounts()["trained"] == 4


def test_the_batch_takes_the_most_stale_groups_first(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    (old,) = grant(ledger)
    train(ledger, make_group, V[0], V[0])
    young = grant(ledger, 2, V[1])
    for visit in young:
        ledger.store(make_group(visit.key, V[1]), b"")
    ledger.store(make_group(old.key, V[0]), b"")
    assert [visit.number for visit in ledger.reserve(V[1], 2)] == [old.number, young[0].number]


def test_the_learner_waits_for_a_pinned_visit_whose_window_ends(make_group: MakeGroup) -> None:
    ledger = make_ledger(max_staleness=0)
    (slow,) = grant(ledger)
    ledger.expire(now=16.0)
    slow.pinned = True
    (again, other) = grant(ledger, 2, now=20.0)
    assert again is slow
    ledger.store(make_group(other.key, V[0], (1.0, 1.0)), b"")
    for visit in grant(ledger, 5, now=20.0):
        ledger.store(make_group(visit.key, V[0]), b"")
    assert ledger.awaited_pins() == [slow]
    assert ledger.reserve(V[0], 2) == []
    ledger.store(make_group(slow.key, V[0]), b"")
    assert slow in ledger.reserve(V[0], 2)


def test_the_learner_does_not_wait_for_a_pinned_visit_with_time_left_or_without_a_lease(make_group: MakeGroup) -> None:
    ledger = make_ledger(max_staleness=1)
    (slow,) = grant(ledger)
    slow.pinned = True
    for visit in grant(ledger, 2):
        ledger.store(make_group(visit.key, V[0]), b"")
    ledger.commit(V[0], tuple(v.number for v in ledger.reserve(V[0], 2)))
    for visit in grant(ledger, 2, V[1]):
        ledger.store(make_group(visit.key, V[1]), b"")
    assert ledger.reserve(V[1], 2) == []
    ledger.expire(now=16.0)
    assert len(ledger.reserve(V[1], 2)) == 2


def test_a_batch_is_whole_or_empty_and_the_same_when_asked_again(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    first, second, third = grant(ledger, 3)
    ledger.store(make_group(first.key, V[0]), b"")
    assert ledger.reserve(V[0], 2) == []
    ledger.store(make_group(third.key, V[0]), b"")
    batch = ledger.reserve(V[0], 2)
    assert batch == [first, third]
    ledger.store(make_group(second.key, V[0]), b"")
    assert ledger.reserve(V[0], 2) == batch


@pytest.mark.parametrize(("version", "num_groups"), [(V[1], 2), (V[0], 3)])
def test_a_batch_of_another_version_or_size_is_refused(version: Version, num_groups: int) -> None:
    with pytest.raises(RefusedError):
        make_ledger().reserve(version, num_groups)


def test_a_commit_is_idempotent_and_refused_for_other_visits(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    for visit in grant(ledger, 2):
        ledger.store(make_group(visit.key, V[0]), b"")
    with pytest.raises(RefusedError):
        ledger.commit(V[0], ())
    ledger.reserve(V[0], 2)
    with pytest.raises(RefusedError):
        ledger.commit(V[0], (0, 3))
    with pytest.raises(RefusedError):
        ledger.commit(V[1], (0, 1))
    assert ledger.commit(V[0], (0, 1)) == ledger.commit(V[0], (1, 0)) == 1
    with pytest.raises(RefusedError):
        ledger.commit(V[0], (0, 2))
    assert ledger.track.current == V[1]
    assert ledger.accounts()["trained"] == 2


def test_at_the_end_everything_that_is_not_trained_is_unused(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    train(ledger, make_group)
    scored, _ = grant(ledger, 2, V[1])
    ledger.store(make_group(scored.key, V[1]), b"")
    ledger.finish("all steps done")
    ledger.finish("again")
    assert ledger.accounts()["unused"] == 2
    assert ledger.accounts()["trained"] == 2
    assert grant(ledger, 10, V[1]) == []
    assert "all steps done" in scored.reason
    with pytest.raises(RefusedError):
        ledger.reserve(V[1], 2)


def test_a_batch_that_is_under_way_when_the_run_ends_is_of_no_step(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    for visit in grant(ledger, 2):
        ledger.store(make_group(visit.key, V[0]), b"")
    batch = ledger.reserve(V[0], 2)
    ledger.finish("because")
    assert [(visit.state, visit.step) for visit in batch] == [(wire.VisitState.UNUSED, None)] * 2


def test_routes_that_nobody_asked_for_are_refused(make_group: MakeGroup) -> None:
    ledger = make_ledger()
    (visit,) = grant(ledger)
    verdict = ledger.store(_with_routes(make_group(visit.key, V[0]), bytes(8)), b"")
    assert verdict.status == "refused"
    assert "found 16 routed experts, expected none" in verdict.reason
    assert ledger.accounts()["waiting"] == 1


def test_what_is_wrong_with_routes_sends_the_prompt_back(make_group: MakeGroup) -> None:
    def check(prompt: int, group: wire.Group) -> str:
        return routes_reason(group.completions[0].routed_experts, 3 + prompt, RouteShape(2, 8, 2))

    ledger = make_ledger(check=check)
    (visit,) = grant(ledger)
    group = make_group(visit.key, V[0])
    verdict = ledger.store(_with_routes(group, bytes(4)), b"")
    assert verdict.reason == "malformed: found 4 routed experts, expected 2 tokens * 2 layers * 2 = 8"
    (again,) = grant(ledger)
    assert again.number == visit.number
    group = make_group(again.key, V[0])
    assert ledger.store(_with_routes(group, bytes(8)), b"").status == "stored"


def _with_routes(scored: wire.ScoredGroup, routes: bytes) -> wire.ScoredGroup:
    replace = msgspec.structs.replace
    completions = tuple(replace(completion, routed_experts=routes) for completion in scored.group.completions)
    return replace(scored, group=replace(scored.group, completions=completions))
