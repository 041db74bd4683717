"""Members, their rates, and how roles overlap."""

import pytest
from hypothesis import given, strategies as st

from common import wire
from common.wire import Role, Span
from learner.ledger.fleet import Fleet
from learner.ledger.overlap import Overlap, intersect, merge


def beat(name: str, start: float, end: float, num_tokens: int = 0, busy: tuple[Span, ...] = ()) -> wire.Beat:
    stats = wire.Stats(interval=Span(start, end), busy=busy, num_tokens=num_tokens, gauges={"queue": end})
    return wire.Beat(role=Role.GENERATOR, name=name, stats=stats)


def test_rates_are_over_the_last_minute() -> None:
    fleet = Fleet([("generator-0", "generator", "")], now=0.0)
    for second in range(100):
        assert fleet.beat(
            beat("generator-0", second, second + 1, 1000 if second >= 90 else 0, (Span(second, second + 0.5),)),
            second + 1,
        )
    (member,) = fleet.members(100.0)
    assert member.tokens_per_s == pytest.approx(10_000 / 61)
    assert member.busy_share == pytest.approx(0.5)
    assert member.gauges == {"queue": 100}
    assert (member.seconds, member.silent_s) == (100.0, 0.0)


def test_the_silent_and_the_unknown_have_to_say_hello() -> None:
    fleet = Fleet([], now=0.0)
    assert not fleet.beat(beat("a", 0, 1), 1.0)
    fleet.join(wire.Hello(role=Role.VERIFIER, name="a", run="", endpoint="tcp://a"), 1.0)
    assert fleet.endpoints() == ("tcp://a",)
    assert fleet.remove_silent(15.0, 15.0) == []
    assert [process.name for process in fleet.remove_silent(17.0, 15.0)] == ["a"]
    assert fleet.endpoints() == ()
    assert "a" not in fleet


def test_overlap_is_the_share_of_time_in_which_learner_and_a_generator_work() -> None:
    overlap = Overlap()
    overlap.add(Role.GENERATOR, Span(0, 100))
    assert overlap.shares(100.0) == (0.0, {})
    overlap.begin_step(100.0)
    overlap.end_step(104.0)
    overlap.add(Role.GENERATOR, Span(102, 106))
    overlap.add(Role.GENERATOR, Span(103, 108))
    share, busy = overlap.shares(110.0)
    assert share == pytest.approx(0.2)
    assert busy == {"generator": pytest.approx(0.6), "learner": pytest.approx(0.4)}
    assert overlap.shares(200.0)[0] == pytest.approx(0.02)
    overlap.begin_step(200.0)
    overlap.add(Role.GENERATOR, Span(200, 300))
    assert overlap.shares(300.0)[0] == pytest.approx(0.51)
    overlap.drop_step()
    assert overlap.shares(300.0)[0] == pytest.approx(0.01)


spans = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)).map(lambda s: Span(s[0], s[0] + s[1])), max_size=8)


@given(left=spans, right=spans)
def test_union_and_intersection_hold_second_by_second(left: list[Span], right: list[Span]) -> None:
    def seconds(of: list[Span]) -> set[int]:
        return {t for span in of for t in range(int(span.start), int(span.end))}

    assert seconds(merge(left)) == seconds(left)
    assert sum(span.end - span.start for span in merge(left)) == len(seconds(left))
    assert seconds(intersect(merge(left), merge(right))) == seconds(left) & seconds(right)
