"""What the ledger holds until something changes, and what ends with time: on a clock that the tests move."""

import asyncio

import pytest
from structlog.testing import capture_logs

from common import wire
from common.errors import RefusedError
from common.rendezvous import RunKeys
from common.sections import LeaseConfig
from common.transport import Client
from common.versions import Version
from learner.ledger.held import HOLD_S
from tests.clocks import PATIENCE_S, run_by_hand
from tests.learner.ledger.roles import (
    Fleet,
    Learner,
    MakeGroup,
    MakeRun,
    has_come,
    let_ticks_pass,
    serving_by_hand,
)


def test_a_process_of_another_run_or_unknown_name_is_told_so(make_run: MakeRun) -> None:
    run_dir, config = make_run(lease=LeaseConfig(heartbeat_timeout_s=10.0))

    async def scenario() -> None:
        async with serving_by_hand(run_dir, config) as client:
            stranger = wire.Hello(role=wire.Role.GENERATOR, name="generator-0", run="another")
            with pytest.raises(RefusedError, match="expected run"):
                await client.ask(stranger, wire.Welcome, deadline_s=PATIENCE_S)
            beat = wire.Beat(role=wire.Role.GENERATOR, name="generator-0")
            assert not (await client.ask(beat, wire.BeatAnswer, deadline_s=PATIENCE_S)).known
            hello = wire.Hello(role=wire.Role.GENERATOR, name="generator-0", run=RunKeys.load(run_dir).public)
            await client.ask(hello, wire.Welcome, deadline_s=PATIENCE_S)
            assert (await client.ask(beat, wire.BeatAnswer, deadline_s=PATIENCE_S)).known
            await let_ticks_pass(10.0)
            assert (await client.ask(beat, wire.BeatAnswer, deadline_s=PATIENCE_S)).known
            await let_ticks_pass(10.5)
            assert not (await client.ask(beat, wire.BeatAnswer, deadline_s=PATIENCE_S)).known

    run_by_hand(scenario())


async def _ask_for_leases(client: Client, version: Version, room: int = 1) -> wire.Leases:
    request = wire.LeaseRequest(name="generator-0", version=version, room=room)
    return await client.ask(request, wire.Leases, deadline_s=PATIENCE_S)


def test_a_generator_that_waits_at_an_old_version_hears_of_a_new_one_at_once(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    run_dir, config = make_run(max_staleness=0)

    async def scenario() -> None:
        async with serving_by_hand(run_dir, config) as client:
            fleet, learner = Fleet(run_dir, client, make_group), Learner(client, config)
            await fleet.join()
            await learner.begin()
            assert await fleet.work(learner.version, room=9) == config.groups_per_step
            batch = await learner.reserve()
            held = asyncio.create_task(_ask_for_leases(client, learner.version))
            await has_come(client)
            assert not held.done()
            await learner.commit(batch)
            leases = await held
            assert leases.leases == ()
            assert leases.waiting_for == "the engine to load 0.1: it is 1 updates behind, expected 0"
            assert len((await _ask_for_leases(client, learner.version, room=9)).leases) == config.groups_per_step

    run_by_hand(scenario())


def test_who_has_no_room_is_answered_at_once_and_keeps_nobody_waiting(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir, config = make_run(max_staleness=0)

    async def scenario() -> None:
        async with serving_by_hand(run_dir, config) as client:
            full, other = (Fleet(run_dir, client, make_group, f"generator-{i}") for i in range(2))
            learner = Learner(client, config)
            await full.join()
            await other.join()
            await learner.begin()
            none = await _ask_for_leases(client, learner.version, room=0)
            assert none.leases == ()
            assert await other.work(learner.version, room=9) == config.groups_per_step

    run_by_hand(scenario())


def test_generators_that_wait_are_served_in_the_order_in_which_they_came(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    """A filtered group frees its place: one at a time."""
    run_dir, config = make_run(max_staleness=1)

    async def scenario() -> None:
        async with serving_by_hand(run_dir, config) as client:
            names = [f"generator-{i}" for i in range(4)]
            learner = Learner(client, config)
            for name in names:
                await Fleet(run_dir, client, make_group, name).join()
            await learner.begin()
            leases = (await _ask_for_leases(client, learner.version, room=9)).leases
            assert len(leases) == 2 * config.groups_per_step
            answered: list[str] = []

            async def wait(name: str) -> None:
                request = wire.LeaseRequest(name=name, version=learner.version, room=1)
                assert len((await client.ask(request, wire.Leases, deadline_s=PATIENCE_S)).leases) == 1
                answered.append(name)

            order = [names[2], names[3], names[1]]
            async with asyncio.TaskGroup() as waiting:
                for name in order:
                    waiting.create_task(wait(name))
                    await has_come(client)
                for num, lease in enumerate(leases[:3], start=1):
                    group = make_group(lease.key, learner.version, (1.0, 1.0))
                    await client.ask(group, wire.Verdict, deadline_s=PATIENCE_S)
                    await has_come(client)
                    assert answered == order[:num]

    run_by_hand(scenario())


def test_only_the_newest_request_of_a_generator_is_granted_leases(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir, config = make_run(max_staleness=0)

    async def scenario() -> None:
        async with serving_by_hand(run_dir, config) as client:
            fleet, learner = Fleet(run_dir, client, make_group), Learner(client, config)
            await fleet.join()
            abandoned = asyncio.create_task(_ask_for_leases(client, learner.version, room=9))
            await has_come(client)
            newest = asyncio.create_task(_ask_for_leases(client, learner.version, room=9))
            await has_come(client)
            await learner.begin()
            assert (await abandoned).leases == ()
            assert len((await newest).leases) == config.groups_per_step
            await fleet.join()
            assert (await client.ask(wire.Status(), wire.StatusReport, deadline_s=PATIENCE_S)).accounts["waiting"] == 2

    run_by_hand(scenario())


def test_the_learner_goes_on_when_the_generator_of_a_pinned_prompt_dies(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    run_dir, config = make_run(max_staleness=1, lease=LeaseConfig(heartbeat_timeout_s=3.0))

    async def scenario() -> None:
        async with serving_by_hand(run_dir, config) as client:
            dying, other = (Fleet(run_dir, client, make_group, f"generator-{i}") for i in range(2))
            learner = Learner(client, config)
            await dying.join()
            await other.join()
            await learner.begin()
            (slow,) = (await _ask_for_leases(client, learner.version)).leases
            for step in range(3):
                if step == 2:
                    (again,) = (await _ask_for_leases(client, learner.version)).leases
                    assert again.key == (slow.key.visit, 2)
                assert await other.work(learner.version, room=2) == 2
                await learner.commit(await learner.reserve())
            assert await other.work(learner.version, room=2) == 2
            reserving = asyncio.create_task(learner.reserve())
            await has_come(client)
            await let_ticks_pass(HOLD_S)
            held = await reserving
            assert held.groups == ()
            assert held.waiting_for.startswith(f"visit {slow.key.visit} at version 0.3: expired before")
            await let_ticks_pass(3.5 - HOLD_S)
            batch = await learner.reserve()
            assert [group.has_expired for group in batch.groups] == [False] * config.groups_per_step
            report = await client.ask(wire.Status(), wire.StatusReport, deadline_s=PATIENCE_S)
            assert report.accounts["waiting"] == 1

    run_by_hand(scenario())


def test_the_learner_goes_on_when_a_pinned_prompt_is_given_back_and_that_it_was_given_up_is_told(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    run_dir, config = make_run(max_staleness=1, lease=LeaseConfig(max_attempts=2))

    async def scenario() -> None:
        async with serving_by_hand(run_dir, config) as client:
            late, other = (Fleet(run_dir, client, make_group, f"generator-{i}") for i in range(2))
            learner = Learner(client, config)
            await late.join()
            await other.join()
            await learner.begin()
            (slow,) = (await _ask_for_leases(client, learner.version)).leases
            assert (slow.deadline_s, slow.min_completions) == (600.0, 2)
            for step in range(3):
                if step == 2:
                    (slow,) = (await _ask_for_leases(client, learner.version)).leases
                    assert slow.key == (0, 2)
                assert await other.work(learner.version, room=2) == 2
                await learner.commit(await learner.reserve())
            assert await other.work(learner.version, room=2) == 2
            held = asyncio.create_task(learner.reserve())
            await has_come(client)
            assert not held.done()
            await _give_back(client, slow)
            assert len((await held).groups) == config.groups_per_step
            await _give_back(client, slow)
            accounts = (await client.ask(wire.Status(), wire.StatusReport, deadline_s=PATIENCE_S)).accounts
            assert (accounts["quarantined"], accounts["waiting"]) == (1, 0)

    with capture_logs() as events:
        run_by_hand(scenario())
    (told,) = [event for event in events if event["event"] == "prompt_quarantined"]
    assert told["visit"] == 0
    assert told["prompt"].startswith("train/train/")
    assert told["reason"].endswith("generator-0 gave it back: late")


def test_a_generator_that_leaves_gets_no_lease_by_the_request_that_it_left_behind(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    run_dir, config = make_run(max_staleness=0)

    async def scenario() -> None:
        async with serving_by_hand(run_dir, config) as client:
            fleet, learner = Fleet(run_dir, client, make_group), Learner(client, config)
            await fleet.join()
            await learner.begin()
            leases = (await _ask_for_leases(client, learner.version, room=9)).leases
            abandoned = asyncio.create_task(_ask_for_leases(client, learner.version, room=9))
            await has_come(client)
            assert not abandoned.done()
            await _give_back(client, *leases, leaves=True)
            assert (await abandoned).leases == ()
            report = await client.ask(wire.Status(), wire.StatusReport, deadline_s=PATIENCE_S)
            assert (report.accounts["waiting"], report.accounts["leased"]) == (config.groups_per_step, 0)
            assert wire.Role.GENERATOR not in {member.role for member in report.members}

    run_by_hand(scenario())


async def _give_back(client: Client, *leases: wire.Lease, leaves: bool = False) -> None:
    returned = tuple(wire.Returned(lease.key, "late") for lease in leases)
    request = wire.GiveBack(name="generator-0", leases=returned, leaves=leaves)
    await client.ask(request, wire.Done, deadline_s=PATIENCE_S)
