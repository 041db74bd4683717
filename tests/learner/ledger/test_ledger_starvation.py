"""No prompt starves: one in ten answers 50 times longer than the rest, and has its share of what is trained."""

import math

import pytest
from hypothesis import given, settings, strategies as st

from common.wire import VisitState
from learner.ledger.state import Ledger
from tests.learner.ledger.fleets import LONG_SHARE, STEPS, Simulation, Times, share, simulation_config, wait_bound
from tests.learner.ledger.rules import scored_group

FAST = Times(num_slots=24, step_s=1.0, load_s=0.3)


def sampling_error(simulation: Simulation) -> float:
    """Three standard deviations of a share among the groups of `STEPS` steps, drawn one by one."""
    num = STEPS * simulation.config.groups_per_step
    return 3 * math.sqrt(LONG_SHARE * (1 - LONG_SHARE) / num)


@settings(max_examples=40, derandomize=True)
@given(
    max_staleness=st.integers(0, 6),
    groups_per_step=st.integers(1, 8),
    num_slots=st.integers(1, 64),
    step_s=st.sampled_from([0.1, 1.0, 10.0]),
    load_s=st.sampled_from([0.0, 0.5, 3.0]),
    seed=st.integers(0, 999),
)
def test_long_answers_have_their_share_of_what_is_trained_and_no_prompt_waits_without_bound(
    max_staleness: int, groups_per_step: int, num_slots: int, step_s: float, load_s: float, seed: int
) -> None:
    config = simulation_config(max_staleness, groups_per_step)
    simulation = Simulation(config, Times(num_slots, step_s, load_s), seed=seed)
    bound = wait_bound(max_staleness)
    simulation.run(bound + STEPS)
    assert share(simulation) == pytest.approx(LONG_SHARE, abs=sampling_error(simulation))
    assert max(t.step - t.handed_out for t in simulation.trained) <= bound
    for state in (VisitState.WAITING, VisitState.LEASED, VisitState.SCORED):
        for visit in simulation.ledger.visits(state):
            assert simulation.version.number - simulation.handed_out[visit.number] <= bound
    assert simulation.max_attempts <= 2
    assert simulation.ledger.accounts()["quarantined"] == 0


def test_two_pinned_visits_that_end_with_one_step_are_awaited_the_step_before() -> None:
    ledger = Ledger(simulation_config(max_staleness=2, groups_per_step=1), lambda n: (n, ""))
    current = ledger.begin(None)
    assert [visit.number for visit in ledger.grant("g", current, 3, 0.0)] == [0, 1, 2]

    def score(number: int) -> list[int]:
        """The batch that is there once a visit is scored."""
        (visit,) = (v for v in ledger.visits(VisitState.LEASED) if v.number == number)
        assert visit.granted is not None
        assert ledger.store(scored_group(visit.key, (visit.granted,), (1.0, 0.0)), b"").status == "stored"
        return [v.number for v in ledger.reserve(current, 1)]

    for fast in (0, 3, 4):  # 1 and 2 are slow, and expire when the third step is done
        assert score(fast) == [fast]
        ledger.commit(current, (fast,))
        current = current.next()
        ledger.grant("g", current, 3, 0.0)
    assert [visit.number for visit in ledger.visits(VisitState.LEASED) if visit.pinned] == [1, 2]
    assert score(5) == [5]  # both have this step and two more
    ledger.commit(current, (5,))
    current = current.next()
    ledger.grant("g", current, 3, 0.0)
    assert score(6) == []  # two steps are left for two
    assert [visit.number for visit in ledger.awaited_pins()] == [1, 2]
    assert score(2) == [2]
    ledger.commit(current, (2,))
    current = current.next()
    assert ledger.reserve(current, 1) == []
    assert score(1) == [1]


@pytest.mark.parametrize("max_staleness", [1, 4])
def test_without_pins_long_answers_are_given_up_by_name_and_miss_their_share(max_staleness: int) -> None:
    pinned, not_pinned = (
        Simulation(simulation_config(max_staleness, 4), FAST, seed=1, pins=pins) for pins in (True, False)
    )
    for simulation in (pinned, not_pinned):
        simulation.run(wait_bound(max_staleness) + STEPS)
        assert simulation.num_expired > STEPS / 5
    assert share(pinned) == pytest.approx(LONG_SHARE, abs=sampling_error(pinned))
    assert share(not_pinned) < LONG_SHARE - sampling_error(not_pinned)
    assert not_pinned.ledger.accounts()["quarantined"] > 0
    assert pinned.ledger.accounts()["quarantined"] == 0
