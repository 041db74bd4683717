"""What comes from peers that do not belong, or no longer do: the real ledger refuses it and serves the others."""

import asyncio
import random
import signal
import socket
from pathlib import Path

import msgspec
import pytest

from common import wire
from common.errors import RefusedError
from common.limits import max_request_bytes
from common.rendezvous import Rendezvous, RunKeys
from common.transport import Client, ledger_client
from common.versions import Version
from tests.clocks import PATIENCE_S
from tests.common.corpus import MANIFEST, MESSAGES
from tests.common.test_wire_fuzz import cut, flip, insert, replace
from tests.learner.ledger.roles import Fleet, Learner, MakeGroup, MakeRun, command, restart, serving
from tests.learner.ledger.strangers import STATUS, Attacker, logged, refused, strait, undisturbed, wait_for


def test_peers_without_the_runs_key_are_counted_and_logged_once(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir, _ = make_run()
    (tmp_path / "other").mkdir()
    other, ours = RunKeys.create(tmp_path / "other"), RunKeys.load(run_dir)
    strangers: tuple[tuple[RunKeys | None, str], ...] = ((other, ""), (None, ""), (ours, other.public))

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            await client.ask(STATUS, wire.StatusReport, deadline_s=PATIENCE_S)
            async with undisturbed(client):
                for number, (keys, server) in enumerate(strangers * 2):
                    with Attacker(run_dir, keys, server) as attacker:
                        await attacker.send(b"request0", wire.encode(STATUS))
                        await wait_for(client, "connections", number + 1)
                before = (await refused(client))["connections"]
                host, port = Rendezvous.read(run_dir).address.removeprefix("tcp://").split(":")
                for number, data in enumerate((b"GET / HTTP/1.1\r\n\r\n", b"")):
                    with socket.create_connection((host, int(port))) as connection:
                        connection.send(data)
                    await wait_for(client, "connections", before + number + 1)
            assert (await refused(client))["malformed"] == 0

    asyncio.run(scenario())
    lines = logged(run_dir)
    assert {line["kind"] for line in lines} == {"connections"}
    assert len(lines) == len({line["peer"] for line in lines}) <= 2  # this address, and one that had gone too soon
    assert all("\n" not in line["reason"] and "expected" in line["reason"] for line in lines)


def test_malformed_messages_are_refused_counted_and_logged_once_per_peer(make_run: MakeRun) -> None:
    run_dir, _ = make_run()
    endless_name = wire.Beat(role=wire.Role.GENERATOR, name="x" * 1_000_000)
    messages = [
        b"\xc1",
        wire.encode(STATUS)[:-1],
        wire.encode(wire.Done()),
        wire.encode(endless_name),
        b"",
        b"\x91" * 9999,
    ]

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            await client.ask(STATUS, wire.StatusReport, deadline_s=PATIENCE_S)
            async with undisturbed(client):
                with Attacker(run_dir, RunKeys.load(run_dir)) as attacker:
                    for data in messages:
                        answer = await attacker.ask(data)
                        assert isinstance(answer, wire.Refused)
                        assert len(answer.reason) < 400
                        assert "\n" not in answer.reason
                    await attacker.send(b"no id")
                    await attacker.send(b"request0", *[b"x"] * 9)
                    await wait_for(client, "malformed", len(messages) + 2)

    asyncio.run(scenario())
    assert [line["kind"] for line in logged(run_dir)] == ["malformed"]


def test_peers_with_new_identities_for_ever_fill_neither_log_nor_memory(make_run: MakeRun) -> None:
    run_dir, _ = make_run()

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            await client.ask(STATUS, wire.StatusReport, deadline_s=PATIENCE_S)
            async with undisturbed(client):
                for _ in range(400):
                    with Attacker(run_dir, RunKeys.load(run_dir)) as attacker:
                        assert isinstance(await attacker.ask(b"\xc1"), wire.Refused)
            assert (await refused(client))["malformed"] == 400

    asyncio.run(scenario())
    assert len(logged(run_dir)) == 256


def test_a_message_above_the_limit_ends_its_connection_before_it_takes_memory(make_run: MakeRun) -> None:
    """The ledger ends it though most of the message never comes: it goes by the size that the message begins with."""
    run_dir, config = make_run()
    limit = max_request_bytes(config)
    assert limit < 32 << 20

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            await client.ask(STATUS, wire.StatusReport, deadline_s=PATIENCE_S)
            async with undisturbed(client), strait(run_dir, limit // 16) as address:
                with Attacker(run_dir, RunKeys.load(run_dir), address=address) as attacker:
                    for _ in range(4):
                        assert isinstance(await attacker.ask(wire.encode(STATUS)), wire.StatusReport)
                        await attacker.send(b"request0", bytes(limit + 1))
                        await attacker.connection_ended()
            assert sum((await refused(client)).values()) == 0

    asyncio.run(scenario())


def test_who_never_said_hello_gets_and_changes_nothing(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir, config = make_run()

    async def scenario() -> None:
        async with serving(run_dir) as (_, client), ledger_client(run_dir) as stranger:
            fleet, learner = Fleet(run_dir, client, make_group), Learner(client, config)
            await fleet.join()
            await learner.begin()
            (lease,) = await _leases(client, learner)
            strange = Learner(stranger, config)
            for request in (
                wire.Begin(checkpoint=None),
                wire.Reserve(version=strange.version, num_groups=config.groups_per_step),
                wire.Commit(version=strange.version, visits=(lease.key.visit,)),
                wire.Checkpoint(version=strange.version),
                wire.Evaluate(version=strange.version),
                wire.Finish(reason="because"),
            ):
                with pytest.raises(RefusedError, match="expected the learner that joined last"):
                    await stranger.ask(request, wire.Done, deadline_s=PATIENCE_S)
            group = make_group(lease.key, learner.version)
            for data in (_by("verifier-9", group), group):
                with pytest.raises(RefusedError, match=r"expected its hello first|expected the one that joined last"):
                    await stranger.ask(data, wire.Verdict, deadline_s=PATIENCE_S)
            assert not await _leases(stranger, learner, "generator-9")
            with pytest.raises(RefusedError, match="found generator-0 of another process"):
                await _leases(stranger, learner)
            assert (await client.ask(group, wire.Verdict, deadline_s=PATIENCE_S)).status == "stored"
            assert (await refused(client))["requests"] == 9

    asyncio.run(scenario())
    assert [line["kind"] for line in logged(run_dir)] == ["requests"]


def test_what_is_sent_again_is_idempotent_or_refused(make_run: MakeRun, make_group: MakeGroup) -> None:
    """Also after the ledger was killed; and a process that was replaced is fenced, its old hello too."""
    run_dir, config = make_run(max_staleness=2)

    async def scenario() -> None:
        async with serving(run_dir) as (process, client), ledger_client(run_dir) as newer:
            fleet, learner = Fleet(run_dir, client, make_group), Learner(client, config)
            await fleet.join()
            await learner.begin()
            old = wire.Hello(role=wire.Role.LEARNER, name="learner-0", run=RunKeys.load(run_dir).public)
            await client.ask(old, wire.Welcome, deadline_s=PATIENCE_S)
            leases = [*await _leases(client, learner), *await _leases(client, learner)]
            groups = [make_group(lease.key, learner.version) for lease in leases]
            commit = wire.Commit(version=learner.version, visits=tuple(lease.key.visit for lease in leases))
            for is_again in (False, True):
                if is_again:
                    await restart(process, client)
                statuses = [
                    (await client.ask(group, wire.Verdict, deadline_s=PATIENCE_S)).status for group in groups * 2
                ]
                assert statuses[2:] == ["duplicate"] * 2
                if not is_again:
                    await learner.reserve()
                for _ in range(2):
                    assert (await client.ask(commit, wire.Committed, deadline_s=PATIENCE_S)).sequence == 1
            with pytest.raises(RefusedError, match=r"found a commit of the step from 0\.0"):
                await client.ask(
                    wire.Commit(version=learner.version, visits=(0, 7)), wire.Committed, deadline_s=PATIENCE_S
                )
            with pytest.raises(RefusedError, match=r"found a resume from 0\.0, commit 9"):
                await client.ask(wire.Begin(checkpoint=learner.version, sequence=9), wire.Begun, deadline_s=PATIENCE_S)
            await Learner(newer, config).hello()
            with pytest.raises(RefusedError, match="expected the learner that joined last"):
                await client.ask(commit, wire.Committed, deadline_s=PATIENCE_S)
            with pytest.raises(RefusedError, match="found a hello of an older learner-0"):
                await client.ask(old, wire.Welcome, deadline_s=PATIENCE_S)
            assert (await newer.ask(commit, wire.Committed, deadline_s=PATIENCE_S)).sequence == 1

    asyncio.run(scenario())


def test_a_hello_that_is_sent_again_frees_no_lease(make_run: MakeRun, make_group: MakeGroup) -> None:
    run_dir, config = make_run()

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            learner = Learner(client, config)
            await learner.begin()
            hello = wire.Hello(role=wire.Role.GENERATOR, name="generator-0", run=RunKeys.load(run_dir).public)
            await client.ask(hello, wire.Welcome, deadline_s=PATIENCE_S)
            assert len(await _leases(client, learner)) == 1
            for number, again in ((1, hello), (0, wire.Hello(role=hello.role, name=hello.name, run=hello.run))):
                await client.ask(again, wire.Welcome, deadline_s=PATIENCE_S)
                assert (await client.ask(STATUS, wire.StatusReport, deadline_s=PATIENCE_S)).accounts["leased"] == number

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(3))
def test_a_member_that_has_gone_mad_does_not_bring_the_ledger_down(
    make_run: MakeRun, make_group: MakeGroup, seed: int
) -> None:
    """It may ask everything, and asks it mutated; whatever it does, the sums hold."""
    run_dir, config = make_run(max_staleness=2)
    rng, run = random.Random(seed), RunKeys.load(run_dir).public
    version, name, num = Version(0, 0), "generator-0", config.groups_per_step
    keys = [wire.LeaseKey(visit, 1) for visit in (-1, 0, 1, 2)]
    fitting = (
        wire.Begin(checkpoint=None),
        wire.LeaseRequest(name=name, version=version, room=2),
        wire.Beat(role=wire.Role.GENERATOR, name=name, holds=tuple(keys)),
        wire.Reserve(version=version, num_groups=num),
        wire.Commit(version=version, visits=(0, 1)),
        wire.Publish(manifest=msgspec.structs.replace(MANIFEST, version=version)),
        wire.Evaluate(version=version),
        wire.Checkpoint(version=version),
        *(make_group(key, version, (1.0, 0.0)[: 1 if key.is_evaluation else 2]) for key in keys),
    )

    async def scenario() -> None:
        async with serving(run_dir) as (process, client):
            await client.ask(STATUS, wire.StatusReport, deadline_s=PATIENCE_S)
            with Attacker(run_dir, RunKeys.load(run_dir)) as attacker:
                async with undisturbed(client):
                    for role in (wire.Role.LEARNER, wire.Role.GENERATOR, wire.Role.VERIFIER):
                        hello = wire.Hello(role=role, name=f"{role}-0", run=run)
                        assert isinstance(await attacker.ask(wire.encode(hello)), wire.Welcome)
                    for number in range(4000):
                        message = wire.encode(rng.choice(rng.choice((MESSAGES, fitting))))
                        data = rng.choice((flip, cut, insert, replace, lambda _, same: same))(rng, message)
                        await attacker.send(number.to_bytes(8, "big"), data)
                        if number % 100 == 0:
                            await asyncio.sleep(0)
                    await attacker.ask(wire.encode(STATUS))
            found = await refused(client)
            assert found["malformed"] > 1000
            assert found["requests"] > 100
            assert process.stop(signal.SIGTERM) == 0

    asyncio.run(scenario())
    assert command(run_dir, "--audit").returncode == 0


async def _leases(client: Client, learner: Learner, name: str = "generator-0") -> tuple[wire.Lease, ...]:
    request = wire.LeaseRequest(name=name, version=learner.version, room=1)
    return (await client.ask(request, wire.Leases, deadline_s=PATIENCE_S)).leases


def _by(verifier: str, group: wire.ScoredGroup) -> wire.ScoredGroup:
    return wire.ScoredGroup(group=group.group, grades=group.grades, verifier=verifier)
