"""Late completions and leases that are given back, on the real engine and with the real ledger."""

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common import wire
from common.sections import EvaluationConfig, GeneratorConfig, LeaseConfig, SamplingConfig
from common.versions import Version
from generator.engine import Engine
from learner.ledger.audit import audit
from learner.ledger.leases import lease_seed
from tests.clocks import PATIENCE_S, move_time, settle
from tests.generator.bigrams import END, SHORT
from tests.generator.conftest import RunningEngine, until
from tests.generator.sites import Site, make_run, site
from tests.groups import completion, grade, training_group
from tests.learner.ledger.roles import Fleet

PATIENT = LeaseConfig(heartbeat_timeout_s=2 * PATIENCE_S)  # a fleet that a test drives by hand has no heartbeat
LATE = LeaseConfig(completion_timeout_s=PATIENCE_S, max_attempts=2)  # it passes when a test says so
LONGER, LONGEST = SamplingConfig(max_tokens=4000), SamplingConfig(max_tokens=30_000)
MANY_TOKENS = 50  # of an answer that does not end


async def most_tokens_until_idle(engine: Engine) -> int:
    """How many tokens the KV cache had at most until its requests ended: what is not stopped has all in the end."""
    seen = [engine.load_now()]

    def is_idle() -> bool:
        seen.append(engine.load_now())
        return seen[-1].num_running == 0

    await until(is_idle, "the engine to be idle")
    return max(load.num_cached_tokens for load in seen)


async def late_until(engine: Engine, holds: Callable[[], Awaitable[bool]], what: str) -> None:
    """The leases' time passes whenever all short answers have ended and the endless ones go on, until something holds.

    Only the generator's time: the ledger is a process of its own.
    """

    def only_endless() -> bool:
        load = engine.load_now()
        return load.num_waiting == 0 and load.num_cached_tokens > MANY_TOKENS * load.num_running > 0

    async def look() -> bool:
        if only_endless():
            move_time(LATE.completion_timeout_s)
            await until(lambda: not only_endless(), "the late answers to be stopped")
        return await holds()

    await until(look, what)


def test_a_lease_that_falls_behind_stops_using_the_engine(bigrams: RunningEngine, tmp_path: Path) -> None:
    """By the scheduler's own count of requests and of tokens in the KV cache. Another generator does the steps."""
    engine, run_dir, prompts = bigrams.engine, tmp_path / "run", ["b", *["a"] * 9]
    one = GeneratorConfig(max_groups=1)
    config = make_run(
        run_dir, bigrams.model, prompts, group_size=2, max_staleness=1, sampling=LONGEST, generator=one, lease=PATIENT
    )
    idle, seen = engine.load_now(), []

    async def scenario() -> None:
        async with site(engine, run_dir, config) as at:
            await until(lambda: engine.load_now().num_running == 2, "the engine to begin")
            seen.append(engine.load_now())
            other = Fleet(run_dir, at.ledger, scored_by_hand, name="generator-1")
            await other.join()
            for room in (3, 2):
                assert await other.work(at.learner.version, room) == room
                await until(lambda: engine.load_now().num_cached_tokens > seen[-1].num_cached_tokens, "more tokens")
                seen.append(engine.load_now())
                await at.learner.commit(await at.learner.reserve())
            assert await most_tokens_until_idle(engine) < LONGEST.max_tokens  # of two: stopped before half of their end
            assert at.rollouts.holds() == ()

    bigrams.run(scenario())
    assert (idle.num_running, idle.num_waiting) == (0, 0)
    assert [load.num_running for load in seen] == [2, 2, 2]
    assert engine.load_now() == idle


def scored_by_hand(key: wire.LeaseKey, version: Version, correct: tuple[float, ...]) -> wire.ScoredGroup:
    """A group that no engine sampled."""
    assert key.attempt == 1
    completions = [completion([2], [-0.5], version, seed=i) for i in range(len(correct))]
    return training_group([2], completions, map(grade, correct), visit=key.visit).scored


def test_a_late_group_is_given_back_until_its_attempts_are_used_up(bigrams: RunningEngine, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = make_run(run_dir, bigrams.model, ["="] * 2, group_size=8, max_staleness=0, sampling=LONGER, lease=LATE)

    async def scenario() -> None:
        async with site(bigrams.engine, run_dir, config) as at:
            await late_until(bigrams.engine, lambda: _at_least(at, "quarantined", 2), "two prompts to be given up")
            assert at.verifier.groups == []

    bigrams.run(scenario())
    reasons = [line for line in audit(run_dir).lines if line.startswith("quarantined: ")]
    assert len(reasons) == 2
    gave_up = "2 attempts used up, the last: generator-0 gave it back:"
    expected = rf"quarantined: visit \d \(train/train/\d\): {gave_up} [0-7] of 8 completions after {PATIENCE_S:g} s, "
    assert all(re.match(rf"{expected}expected 8$", reason) for reason in reasons), reasons


def test_no_lease_is_asked_for_while_a_version_is_loaded(
    bigrams: RunningEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, run_dir = GeneratorConfig(max_groups=1), tmp_path / "run"
    config = make_run(
        run_dir, bigrams.model, ["="] * 2, group_size=8, max_staleness=0, sampling=LONGER, lease=LATE, generator=one
    )

    async def scenario() -> None:
        async with site(bigrams.engine, run_dir, config) as at:
            ask, was_ready = at.ledger.ask, list[bool]()

            async def noted(message: wire.Request, expect: Any, *, deadline_s: float) -> Any:
                if isinstance(message, wire.LeaseRequest):
                    was_ready.append(at.weights.ready.is_set())
                return await ask(message, expect, deadline_s=deadline_s)

            monkeypatch.setattr(at.ledger, "ask", noted)
            await until(lambda: bool(at.rollouts.holds()), "a lease")
            at.weights.ready.clear()
            await late_until(bigrams.engine, lambda: _is_idle(at), "the lease to be given back")
            await settle()
            at.weights.ready.set()
            await until(lambda: bool(at.rollouts.holds()), "another lease")
            assert all(was_ready)

    bigrams.run(scenario())


def test_a_group_is_trained_without_its_late_completions_and_an_evaluation_is_not_counted_without_them(
    bigrams: RunningEngine, tmp_path: Path
) -> None:
    evaluation = EvaluationConfig(num_samples=8, sampling=LONGER)
    lease = msgspec.structs.replace(LATE, late="train_rest")
    changes = {"group_size": 8, "max_staleness": 0, "sampling": LONGER, "evaluation": evaluation, "lease": lease}
    config = make_run(tmp_path / "run", bigrams.model, ["="] * 9, **changes)

    async def scenario() -> wire.Batch:
        async with site(bigrams.engine, tmp_path / "run", config) as at:
            await at.ledger.ask(wire.Evaluate(version=Version(0, 0)), wire.Done, deadline_s=PATIENCE_S)
            await late_until(bigrams.engine, lambda: _at_least(at, "scored", 2), "a batch")
            batch = await at.learner.reserve()
            await late_until(bigrams.engine, lambda: _is_evaluated(at), "the evaluation")
            (result,) = (await at.status()).evaluations
            assert (result.num_prompts, result.num_failed) == (2, 16)
            assert not [group for group in at.verifier.groups if group.key.is_evaluation]
            return batch

    batch = bigrams.run(scenario())
    assert len(batch.groups) == 2
    for training in batch.groups:
        group = training.scored.group
        first = lease_seed(config.seed, group.key)
        seeds = [completion.seed - first for completion in group.completions]
        assert 2 <= len(seeds) < 8
        assert seeds == sorted(set(seeds) & set(range(8)))
        assert {tuple(wire.ints(completion.token_ids)) for completion in group.completions} == {(SHORT, END)}


def test_a_group_that_waits_for_a_verifier_is_not_late(bigrams: RunningEngine, tmp_path: Path) -> None:
    config = make_run(tmp_path / "run", bigrams.model, ["a"] * 4, group_size=4, max_staleness=0, lease=LATE)

    async def scenario() -> None:
        async with site(bigrams.engine, tmp_path / "run", config) as at:
            at.verifier.is_open = False
            await until(lambda: len(at.rollouts.finished()) == 2, "two whole groups")
            move_time(LATE.completion_timeout_s)
            await settle()
            at.verifier.is_open = True
            await until(lambda: _at_least(at, "scored", 2), "a batch")
            assert sorted(group.key for group in at.verifier.groups) == [(0, 1), (1, 1)]

    bigrams.run(scenario())


def test_a_generator_that_stops_leaves_its_leases_to_others_at_once(bigrams: RunningEngine, tmp_path: Path) -> None:
    config = make_run(tmp_path / "run", bigrams.model, ["b"] * 4, group_size=4, max_staleness=0, sampling=LONGER)

    async def scenario() -> None:
        async with site(bigrams.engine, tmp_path / "run", config) as at:
            await until(lambda: len(at.rollouts.holds()) == 2, "two leases")
            held = at.rollouts.holds()
            at.stop()
            await at.rollouts.leave(held)
            report = await at.status()
            assert (report.accounts["waiting"], report.accounts["leased"]) == (2, 0)
            assert wire.Role.GENERATOR not in {member.role for member in report.members}
            assert await most_tokens_until_idle(bigrams.engine) < 8 * LONGER.max_tokens / 4  # of eight

    bigrams.run(scenario())


async def _at_least(at: Site, state: str, num: int) -> bool:
    return (await at.status()).accounts[state] >= num


async def _is_idle(at: Site) -> bool:
    return at.rollouts.holds() == ()


async def _is_evaluated(at: Site) -> bool:
    return bool((await at.status()).evaluations)
