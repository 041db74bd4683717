"""Processes that stand still for longer than their leases, and come back."""

from collections.abc import Callable

import pytest

from common import wire
from tests.system.accounts import Cost, visits
from tests.system.conftest import ENDLESS, Run

pytestmark = [pytest.mark.full, pytest.mark.faults]

TIMEOUT_S = 10
SHORT = (
    *ENDLESS,
    "learner.checkpoint_every=100",
    f"lease.heartbeat_timeout_s={TIMEOUT_S}",
    "verifier.deadline_s=60",
)


def test_a_generator_that_stood_still_comes_back_and_its_late_groups_are_refused(
    start_run: Callable[..., Run], report: Callable[[str, str, Cost], None]
) -> None:
    run = start_run(*SHORT, "generator.count=2")
    run.wait_until(lambda: run.num_joins("generator-0") and run.num_joins("generator-1"), "two generators")
    run.wait_until(run.accuracies, "the first evaluation")
    run.wait_for_step(2)
    run.stop_workers("verifier")
    run.wait_until(lambda: _all_wait_for_grades(run), "all leased groups to be at the verifier")
    holder = next(v.holder for v in visits(run.directory) if v.holder)
    num_joins = run.num_joins(holder)
    stopped_at = run.stop("generator", holder)
    leased = {v.number: v.attempt for v in visits(run.directory) if v.holder == holder}
    run.wait_until(lambda: run.was_lost(holder), f"the ledger to give up {holder}")
    run.wait_until(lambda: _were_granted_anew(run, leased), "its visits to be leased to the other")
    run.go_on("verifier")
    run.wait_until(lambda: leased.keys() & _visits(run, "ledger", "group_refused"), "its late groups to be refused")
    run.go_on("generator", holder)
    run.wait_until(lambda: run.num_joins(holder) > num_joins, f"{holder} to join again")
    run.wait_for_steps(4)
    run.finish()
    assert "restart" not in run.output()
    report(
        "a generator stands still (SIGSTOP) for longer than its leases, then goes on",
        "its leases go to another, its late groups are not taken, it joins again",
        run.assert_survived(stopped_at),
    )


def test_a_verifier_that_stood_still_comes_back_and_no_group_is_stored_twice(
    start_run: Callable[..., Run], report: Callable[[str, str, Cost], None]
) -> None:
    run = start_run(*SHORT, "verifier.count=2")
    run.wait_for_step(2)
    run.stop_workers("verifier", "verifier-0")
    run.wait_until(lambda: _num_in_work(run.status())["verifier-0"], "a group to be at verifier-0")
    num_joins = run.num_joins("verifier-0")
    stopped_at = run.stop("verifier", "verifier-0")
    run.wait_until(lambda: run.was_lost("verifier-0"), "the ledger to give up verifier-0")
    run.wait_for_steps(4)
    run.go_on("verifier", "verifier-0")
    run.wait_until(lambda: _is_turned_away(run, "verifier-0"), "what it grades late not to be taken")
    run.wait_until(lambda: run.num_joins("verifier-0") > num_joins, "verifier-0 to join again")
    run.wait_for_steps(4)
    run.finish()
    assert "restart" not in run.output()
    report(
        "a verifier stands still (SIGSTOP) for longer than its leases, then goes on",
        "groups that it holds are sent to another; what it grades late is refused, or a duplicate",
        run.assert_survived(stopped_at),
    )


def _num_in_work(report: wire.StatusReport) -> dict[str, float]:
    """How many groups each verifier held at its last beat."""
    return {m.name: m.gauges.get("groups_in_work", 0) for m in report.members if m.role is wire.Role.VERIFIER}


def _all_wait_for_grades(run: Run) -> bool:
    """Whether the verifiers hold all groups that are leased, and there are any."""
    report = run.status()
    return 0 < report.accounts["leased"] == sum(_num_in_work(report).values())


def _were_granted_anew(run: Run, leased: dict[int, int]) -> bool:
    """Whether none of the leases is open, and one of the visits has gone to another attempt."""
    now = [v for v in visits(run.directory) if v.number in leased]
    is_open = any(v.holder and v.attempt == leased[v.number] for v in now)
    return not is_open and any(v.attempt > leased[v.number] for v in now)


def _is_turned_away(run: Run, verifier: str) -> bool:
    """Whether the ledger has refused a group of a verifier that it had given up, or has it already."""
    refused = [event["reason"] for event in run.events("ledger", "refused")]
    return bool(_visits(run, "ledger", "group_duplicate")) or any(f"a group from {verifier}" in r for r in refused)


def _visits(run: Run, process: str, event: str) -> set[int]:
    """The visits that the events of one name in the log of a process are about."""
    return {entry["visit"] for entry in run.events(process, event)}
