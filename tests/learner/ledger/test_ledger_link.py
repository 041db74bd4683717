"""The learner's link beside the real ledger: how training begins from a checkpoint."""

import asyncio
from pathlib import Path

import pytest

from common import wire
from common.errors import RunDirectoryError
from common.learning import LearnerConfig
from common.versions import Version
from learner.link import LedgerLink
from learner.shared import NO_COMMIT
from tests.clocks import PATIENCE_S
from tests.learner.ledger.roles import Fleet, Learner, MakeGroup, MakeRun, serving


def test_the_ledger_hears_at_the_start_of_a_checkpoint_that_it_was_not_told_of(
    make_run: MakeRun, make_group: MakeGroup
) -> None:
    """Else it keeps what no resume needs; and a checkpoint that is refused is refused for good."""
    run_dir, config = make_run(learner=LearnerConfig(keep_checkpoints=1))

    async def scenario() -> None:
        async with serving(run_dir) as (_, client):
            fleet, learner = Fleet(run_dir, client, make_group), Learner(client, config)
            await fleet.join()
            await learner.begin()
            num = 0
            while num < config.groups_per_step:
                num += await fleet.work(learner.version, room=2)
            await learner.commit(await learner.reserve())
            await asyncio.to_thread(_begin, run_dir)

    asyncio.run(scenario())


def _begin(run_dir: Path) -> None:
    with LedgerLink(run_dir, stall_timeout_s=PATIENCE_S, should_stop=lambda: False) as link:
        with pytest.raises(RunDirectoryError, match=r"knows of 3 visits, expected at most the 2 that were handed out"):
            link.begin(Version(0, 1), wire.Committed(sequence=1, num_visits=3))
        version, _ = link.begin(Version(0, 1), wire.Committed(sequence=1, num_visits=2))
        assert version == Version(1, 1)
        with pytest.raises(RunDirectoryError, match=r"run: the ledger refused Begin: .* older are not kept"):
            link.begin(None, NO_COMMIT)
