"""Messages that are lost, and a network that is cut and mended."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.accounts import Cost, leases
from tests.system.conftest import ENDLESS, Run
from tests.system.namespaces import HERE, distant_generator, two_machines

pytestmark = [pytest.mark.full, pytest.mark.faults]

TIMEOUT_S = 10
LOSSY = Path(__file__).with_name("lossy")
SHORT = (
    *ENDLESS,
    "learner.checkpoint_every=100",
    f"lease.heartbeat_timeout_s={TIMEOUT_S}",
)


def test_a_verifier_that_loses_every_third_message_costs_time_alone(
    start_run: Callable[..., Run], tmp_path: Path, report: Callable[[str, str, Cost], None]
) -> None:
    notes = tmp_path / "lost"
    many = "generator.max_groups=512"  # each message that is lost costs five seconds, of all groups at once
    run = start_run(
        *SHORT, many, "verifier.max_groups=512", environment={"PYTHONPATH": str(LOSSY), "LOSSY_NOTES": str(notes)}
    )
    run.wait_for_step(5)
    run.finish()
    assert notes.stat().st_size > 50
    assert run.events("generator-0", "group_sent_again")
    assert "restart" not in run.output()
    report(
        "a verifier loses every third message that it receives, from the start",
        "silence leads to another try with the same meaning; nothing is stored twice",
        run.assert_survived(run.rows("step")[0]["time"] - run.rows("step")[0]["seconds"]),
    )


def test_a_generator_behind_a_network_that_is_cut_and_mended_joins_again(
    start_run: Callable[..., Run], report: Callable[[str, str, Cost], None]
) -> None:
    with two_machines() as names:
        run = start_run(*SHORT, f"run.host={HERE}", prefix=names.prefix)
        run.wait_for_step(1)
        with distant_generator(run, names, "generator-1", run.model()):
            run.wait_until(lambda: leases(run.directory, "generator-1"), "generator-1 to have leases")
            names.set_cable("down")
            cut_at = time.time()
            run.wait_until(lambda: run.was_lost("generator-1"), "the ledger to give up generator-1")
            run.wait_until(lambda: not leases(run.directory, "generator-1"), "its leases to end")
            run.wait_for_steps(3)
            names.set_cable("up")
            mended_at = time.time()
            run.wait_until(
                lambda: leases(run.directory, "generator-1", since=mended_at), "generator-1 to have leases again"
            )
            run.wait_for_steps(3)
        run.finish()
    report(
        "the network between a generator and the rest is cut for longer than its leases, then mended",
        "its leases go to others, it joins again",
        run.assert_survived(cut_at),
    )
