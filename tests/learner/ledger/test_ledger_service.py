"""The ledger as a process: killed in the middle of a run, and alone in its directory."""

import asyncio
import signal
from pathlib import Path

import pytest

from common import wire
from common.config import Config
from common.transport import Client
from common.versions import Version
from learner.ledger.audit import audit
from tests.clocks import PATIENCE_S
from tests.learner.ledger.roles import Fleet, Learner, MakeGroup, MakeRun, command, restart, serving


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
        await client.ask(wire.Evaluate(version=learner.version), wire.Done, deadline_s=PATIENCE_S)
        for step in range(6):
            assert await fleet.published() == learner.version
            num = 0
            while num < config.groups_per_step:
                num += await fleet.work(learner.version, room=3)
            batch = await learner.reserve()
            assert len(batch.groups) == config.groups_per_step
            if step == 2:
                await restart(process, client)
            assert await learner.reserve() == batch
            await learner.commit(batch)
        await client.ask(wire.Checkpoint(version=learner.version), wire.Done, deadline_s=PATIENCE_S)
        await client.ask(wire.Evaluate(version=learner.version), wire.Done, deadline_s=PATIENCE_S)
        report = await client.ask(wire.Status(), wire.StatusReport, deadline_s=PATIENCE_S)
        assert [e.accuracy for e in report.evaluations] == [1.0]
        assert report.version == Version(0, 6)
        assert 0 <= report.overlap_share <= 1
        await _finish(client, fleet, learner)
        assert process.stop(signal.SIGTERM) == 0
        process.start()


async def _finish(client: Client, fleet: Fleet, learner: Learner) -> None:
    finish = wire.Finish(reason="all steps done")
    pending = await client.ask(finish, wire.Finished, deadline_s=PATIENCE_S)
    assert not pending.done
    assert pending.waiting_for == "4 more groups of the evaluation of 0.6; 0 tokens sampled"
    assert await fleet.work(learner.version, room=10) == 0
    finished = await client.ask(finish, wire.Finished, deadline_s=PATIENCE_S)
    assert finished.done
    assert finished.accounts["trained"] == len(set(learner.trained)) == len(learner.trained) == 12
    assert sum(finished.accounts.values()) == len(fleet.stored)
    assert len(fleet.evaluated) == 8
    assert set(fleet.stored.values()) == set(fleet.evaluated.values()) == {1}


def test_a_second_ledger_on_the_same_directory_is_refused(make_run: MakeRun) -> None:
    run_dir, _ = make_run()

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            await client.ask(wire.Status(), wire.StatusReport, deadline_s=PATIENCE_S)
            second = await asyncio.to_thread(command, run_dir)
            assert second.returncode == 2
            assert second.stderr.startswith("sluice: ")
            assert "another ledger" in second.stderr

    asyncio.run(scenario())
