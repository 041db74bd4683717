"""Held-out evaluations: leases of their own, and what they add up to."""

import math
from collections.abc import Callable

import pytest

from common import wire
from common.config import Config
from common.sections import EvaluationConfig, LeaseConfig, SamplingConfig
from common.versions import Version
from learner.ledger.evaluations import Evaluations

MakeGroup = Callable[..., wire.ScoredGroup]
V = [Version(0, number) for number in range(5)]
SAMPLED = EvaluationConfig(num_samples=2, sampling=SamplingConfig(temperature=1.0))


def make_evaluations(**values: object) -> Evaluations:
    config = Config(**{"evaluation": SAMPLED, **values})  # type: ignore[arg-type]
    return Evaluations(config, [(10, "easy"), (11, "easy"), (12, "hard")])


def test_each_set_gets_its_means_when_the_last_result_is_in(make_group: MakeGroup) -> None:
    evaluations = make_evaluations()
    evaluations.ask(V[3], now=0.0)
    easy, also_easy, hard = evaluations.grant("g", V[3], 10, now=0.0)
    assert [visit.number for visit in (easy, also_easy, hard)] == [-1, -2, -3]
    assert evaluations.store(make_group(easy.key, V[3], (1.0, 0.0)), 1).status == "stored"
    assert evaluations.store(make_group(also_easy.key, V[4], (0.0, None)), 1).status == "stored"
    assert evaluations.finished == []
    assert evaluations.num_pending == 1
    evaluations.store(make_group(hard.key, V[3], (None, None)), 1)
    first, second = evaluations.finished
    assert (first.source, first.num_prompts, first.num_samples, first.num_failed) == ("easy", 2, 2, 1)
    assert first.accuracy == pytest.approx(1 / 3)
    assert first.pass_at_k == 0.5
    assert (first.oldest, first.newest) == (V[3], V[4])
    assert (second.source, second.num_failed) == ("hard", 2)
    assert math.isnan(second.accuracy)
    assert evaluations.num_pending == 0


def test_an_evaluation_is_asked_for_once(make_group: MakeGroup) -> None:
    evaluations = make_evaluations()
    evaluations.ask(V[0], now=0.0)
    evaluations.ask(V[0], now=0.0)
    assert evaluations.num_pending == 3
    for visit in evaluations.grant("g", V[0], 10, now=0.0):
        evaluations.store(make_group(visit.key, V[0], (1.0, 1.0)), 1)
    evaluations.ask(V[0], now=0.0)
    assert evaluations.num_pending == 0


def test_an_older_engine_is_asked_only_after_a_while() -> None:
    evaluations = make_evaluations()
    evaluations.ask(V[2], now=0.0)
    assert evaluations.grant("g", V[1], 10, now=29.0) == []
    assert len(evaluations.grant("g", V[3], 1, now=29.0)) == 1
    assert len(evaluations.grant("g", V[1], 10, now=31.0)) == 2


def test_an_older_engine_waits_for_a_version_that_is_not_published_yet() -> None:
    evaluations = make_evaluations()
    evaluations.ask(V[2], now=math.inf)
    evaluations.drain()
    evaluations.published(V[1], now=50.0)
    assert evaluations.grant("g", V[1], 10, now=99.0) == []
    assert not evaluations.drain()
    evaluations.published(V[2], now=100.0)
    assert [visit.asked_at for visit in evaluations.drain().visits] == [100.0] * 3
    assert evaluations.grant("g", V[1], 10, now=129.0) == []
    assert len(evaluations.grant("g", V[2], 1, now=129.0)) == 1
    assert len(evaluations.grant("g", V[1], 10, now=131.0)) == 2


def test_a_lost_lease_is_granted_again_and_its_late_result_refused(make_group: MakeGroup) -> None:
    evaluations = make_evaluations()
    evaluations.ask(V[0], now=0.0)
    (visit,) = evaluations.grant("g", V[0], 1, now=0.0)
    late = make_group(visit.key, V[0])
    assert evaluations.expire(now=16.0) == 1
    assert evaluations.store(late, 1).status == "refused"
    assert evaluations.grant("h", V[0], 0, now=16.0) == []
    (again,) = evaluations.grant("h", V[0], 1, now=16.0)
    assert again.key == (-1, 2)
    assert evaluations.beat("g", (late.group.key,), 16.0) == (late.group.key,)
    assert evaluations.store(make_group(again.key, V[0]), 1).status == "stored"
    assert evaluations.store(late, 1).status == "duplicate"


def test_a_prompt_whose_attempts_are_used_up_counts_as_failed(make_group: MakeGroup) -> None:
    evaluations = make_evaluations(lease=LeaseConfig(max_attempts=1))
    evaluations.ask(V[0], now=0.0)
    lost, *others = evaluations.grant("g", V[0], 10, now=0.0)
    for visit in others:
        evaluations.store(make_group(visit.key, V[0]), 1)
    assert lost.holder
    assert evaluations.free("g") == 1
    assert [e.num_failed for e in evaluations.finished] == [2, 0]


def test_what_the_learner_left_behind_is_abandoned() -> None:
    evaluations = make_evaluations()
    evaluations.ask(V[1], now=0.0)
    evaluations.ask(V[2], now=0.0)
    evaluations.abandon([V[1]])
    assert evaluations.versions() == {V[1]}
    assert evaluations.num_pending == 3
