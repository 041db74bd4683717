"""The ledger as a process, asked over ZeroMQ by a generator, a verifier and a learner."""

import asyncio
import json
import signal
from pathlib import Path

import pytest

from common import wire
from common.config import Config
from common.errors import RefusedError
from common.rendezvous import RunKeys
from common.sections import LeaseConfig
from common.transport import Client
from common.versions import Version
from learner.ledger.audit import audit
from tests.learner.ledger.roles import Fleet, Learner, MakeGroup, MakeRun, command, serving


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_run_over_a_killed_ledger_loses_and_doubles_nothing(
    make_run: MakeRun, make_group: MakeGroup, max_staleness: int
) -> None:
    run_dir, config = make_run(max_staleness=max_staleness)
    asyncio.run(_whole_run(run_dir, config, make_group))
    found = audit(run_dir)
    assert found.wrong == []
    assert command(run_dir, "--audit").returncode == 0


async def _whole_run(run_dir: Path, config: Config, make_group: MakeGroup) -> None:
    async with serving(run_dir) as (process, client):
        fleet, learner = Fleet(run_dir, client, make_group), Learner(client, config)
        await fleet.join()
        await learner.begin()
        await client.ask(wire.Evaluate(version=learner.version), wire.Done, deadline_s=30)
        for step in range(6):
            assert await fleet.published() == learner.version
            num = 0
            while num < config.groups_per_step:
                num += await fleet.work(learner.version, room=3)
            batch = await learner.reserve()
            assert len(batch.groups) == config.groups_per_step
            if step == 2:
                process.stop(signal.SIGKILL)
                process.start()
            assert await learner.reserve() == batch
            await learner.commit(batch)
        await client.ask(wire.Checkpoint(version=learner.version), wire.Done, deadline_s=30)
        await client.ask(wire.Evaluate(version=learner.version), wire.Done, deadline_s=30)
        report = await client.ask(wire.Status(), wire.StatusReport, deadline_s=30)
        assert [e.accuracy for e in report.evaluations] == [1.0]
        assert report.version == Version(0, 6)
        assert 0 <= report.overlap_share <= 1
        await _finish(client, fleet, learner)
        assert process.stop(signal.SIGTERM) == 0
        process.start()


async def _finish(client: Client, fleet: Fleet, learner: Learner) -> None:
    finish = wire.Finish(reason="all steps done")
    pending = await client.ask(finish, wire.Finished, deadline_s=30)
    assert not pending.done
    assert pending.waiting_for == "4 more groups of the evaluation of 0.6; 0 tokens sampled"
    assert await fleet.work(learner.version, room=10) == 0
    finished = await client.ask(finish, wire.Finished, deadline_s=30)
    assert finished.done
    assert finished.accounts["trained"] == len(set(learner.trained)) == len(learner.trained) == 12
    assert sum(finished.accounts.values()) == len(fleet.stored)
    assert len(fleet.evaluated) == 8
    assert set(fleet.stored.values()) == set(fleet.evaluated.values()) == {1}


def test_a_second_ledger_on_the_same_directory_is_refused(make_run: MakeRun) -> None:
    run_dir, _ = make_run()

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            await client.ask(wire.Status(), wire.StatusReport, deadline_s=30)
            second = await asyncio.to_thread(command, run_dir)
            assert second.returncode == 2
            assert second.stderr.startswith("sluice: ")
            assert "another ledger" in second.stderr

    asyncio.run(scenario())


def test_a_process_of_another_run_or_unknown_name_is_told_so(make_run: MakeRun) -> None:
    run_dir, _ = make_run(lease=LeaseConfig(heartbeat_timeout_s=1.0))

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            stranger = wire.Hello(role=wire.Role.GENERATOR, name="generator-0", run="another")
            with pytest.raises(RefusedError, match="expected run"):
                await client.ask(stranger, wire.Welcome, deadline_s=30)
            beat = wire.Beat(role=wire.Role.GENERATOR, name="generator-0")
            assert not (await client.ask(beat, wire.BeatAnswer, deadline_s=30)).known
            hello = wire.Hello(role=wire.Role.GENERATOR, name="generator-0", run=RunKeys.load(run_dir).public)
            await client.ask(hello, wire.Welcome, deadline_s=30)
            assert (await client.ask(beat, wire.BeatAnswer, deadline_s=30)).known
            await asyncio.sleep(2.0)
            assert not (await client.ask(beat, wire.BeatAnswer, deadline_s=30)).known

    asyncio.run(scenario())


async def _ask_for_leases(client: Client, version: Version, room: int = 1) -> wire.Leases:
    request = wire.LeaseRequest(name="generator-0", version=version, room=room)
    return await client.ask(request, wire.Leases, deadline_s=30)


def test_a_generator_that_waits_at_an_old_version_hears_of_a_new_one_at_once(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    run_dir, config = make_run(max_staleness=0)

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            fleet, learner = Fleet(run_dir, client, make_group), Learner(client, config)
            await fleet.join()
            await learner.begin()
            assert await fleet.work(learner.version, room=9) == config.groups_per_step
            batch = await learner.reserve()
            held = asyncio.create_task(_ask_for_leases(client, learner.version))
            await asyncio.sleep(0.3)
            assert not held.done()
            await learner.commit(batch)
            leases = await asyncio.wait_for(held, timeout=0.5)
            assert leases.leases == ()
            assert leases.waiting_for == "the engine to load 0.1: it is 1 updates behind, expected 0"
            assert len((await _ask_for_leases(client, learner.version, room=9)).leases) == config.groups_per_step

    asyncio.run(scenario())


def test_who_has_no_room_is_answered_at_once_and_keeps_nobody_waiting(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir, config = make_run(max_staleness=0)

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            full, other = (Fleet(run_dir, client, make_group, f"generator-{i}") for i in range(2))
            learner = Learner(client, config)
            await full.join()
            await other.join()
            await learner.begin()
            none = await asyncio.wait_for(_ask_for_leases(client, learner.version, room=0), timeout=1)
            assert none.leases == ()
            assert await other.work(learner.version, room=9) == config.groups_per_step

    asyncio.run(scenario())


def test_generators_that_wait_are_served_in_the_order_in_which_they_came(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    """A filtered group frees its place: one at a time."""
    run_dir, config = make_run(max_staleness=1)

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
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
                assert len((await client.ask(request, wire.Leases, deadline_s=30)).leases) == 1
                answered.append(name)

            order = [names[2], names[3], names[1]]
            async with asyncio.TaskGroup() as waiting:
                for name in order:
                    waiting.create_task(wait(name))
                    await asyncio.sleep(0.1)
                for num, lease in enumerate(leases[:3], start=1):
                    group = make_group(lease.key, learner.version, (1.0, 1.0))
                    await client.ask(group, wire.Verdict, deadline_s=30)
                    await asyncio.sleep(0.3)
                    assert answered == order[:num]

    asyncio.run(scenario())


def test_only_the_newest_request_of_a_generator_is_granted_leases(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir, config = make_run(max_staleness=0)

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            fleet, learner = Fleet(run_dir, client, make_group), Learner(client, config)
            await fleet.join()
            abandoned = asyncio.create_task(_ask_for_leases(client, learner.version, room=9))
            await asyncio.sleep(0.2)
            newest = asyncio.create_task(_ask_for_leases(client, learner.version, room=9))
            await asyncio.sleep(0.2)
            await learner.begin()
            assert (await abandoned).leases == ()
            assert len((await newest).leases) == config.groups_per_step
            await fleet.join()
            assert (await client.ask(wire.Status(), wire.StatusReport, deadline_s=30)).accounts["waiting"] == 2

    asyncio.run(scenario())


def test_the_learner_goes_on_when_the_generator_of_a_pinned_prompt_dies(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    run_dir, config = make_run(max_staleness=1, lease=LeaseConfig(heartbeat_timeout_s=3.0))

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
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
            held = await learner.reserve()
            assert held.groups == ()
            assert held.waiting_for.startswith(f"visit {slow.key.visit} at version 0.3: expired before")
            batch = await learner.reserve()
            assert [group.has_expired for group in batch.groups] == [False] * config.groups_per_step
            report = await client.ask(wire.Status(), wire.StatusReport, deadline_s=30)
            assert report.accounts["waiting"] == 1

    asyncio.run(scenario())


def test_the_learner_goes_on_when_a_pinned_prompt_is_given_back_and_that_it_was_given_up_is_told(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    run_dir, config = make_run(max_staleness=1, lease=LeaseConfig(max_attempts=2))

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
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
            await asyncio.sleep(0.3)
            assert not held.done()
            await _give_back(client, slow)
            assert len((await asyncio.wait_for(held, timeout=0.5)).groups) == config.groups_per_step
            await _give_back(client, slow)
            accounts = (await client.ask(wire.Status(), wire.StatusReport, deadline_s=30)).accounts
            assert (accounts["quarantined"], accounts["waiting"]) == (1, 0)

    asyncio.run(scenario())
    events = [json.loads(line) for line in (run_dir / "logs" / "ledger.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "prompt_quarantined"]
    assert told["visit"] == 0
    assert told["prompt"].startswith("train/train/")
    assert told["reason"].endswith("generator-0 gave it back: late")


def test_a_generator_that_leaves_gets_no_lease_by_the_request_that_it_left_behind(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    run_dir, config = make_run(max_staleness=0)

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            fleet, learner = Fleet(run_dir, client, make_group), Learner(client, config)
            await fleet.join()
            await learner.begin()
            leases = (await _ask_for_leases(client, learner.version, room=9)).leases
            abandoned = asyncio.create_task(_ask_for_leases(client, learner.version, room=9))
            await asyncio.sleep(0.2)
            assert not abandoned.done()
            await _give_back(client, *leases, leaves=True)
            assert (await abandoned).leases == ()
            report = await client.ask(wire.Status(), wire.StatusReport, deadline_s=30)
            assert (report.accounts["waiting"], report.accounts["leased"]) == (config.groups_per_step, 0)
            assert wire.Role.GENERATOR not in {member.role for member in report.members}

    asyncio.run(scenario())


async def _give_back(client: Client, *leases: wire.Lease, leaves: bool = False) -> None:
    returned = tuple(wire.Returned(lease.key, "late") for lease in leases)
    request = wire.GiveBack(name="generator-0", leases=returned, leaves=leaves)
    await client.ask(request, wire.Done, deadline_s=30)
