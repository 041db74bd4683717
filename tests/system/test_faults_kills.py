"""Processes that are killed in the middle of a run, one at a time."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import psutil
import pytest

from common.versions import Version
from common.wire import VisitState
from learner.ledger.store import Store
from learner.ledger.visits import Visit
from tests.clocks import wait_until
from tests.leaks import living
from tests.system.accounts import Cost, lineages, trained, visits
from tests.system.conftest import ENDLESS, Run

pytestmark = [pytest.mark.faults]

SHORT = (*ENDLESS, "lease.heartbeat_timeout_s=10")
SELDOM = "learner.checkpoint_every=1000"
Report = Callable[[str, str, Cost], None]


@pytest.mark.parametrize(
    ("module", "promise"),
    [
        pytest.param(
            "generator",
            "its leases go back; it is started again and takes the newest weights",
            id="generator",
            marks=pytest.mark.full,
        ),
        pytest.param("verifier", "groups that it holds are sent to its successor", id="verifier"),
        pytest.param(
            "learner.ledger",
            "it is started again on its file; nothing that was answered is lost",
            id="ledger",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_process_that_is_killed_is_started_again(
    start_run: Callable[..., Run], report: Report, module: str, promise: str
) -> None:
    run = start_run(*SHORT, SELDOM)
    run.wait_for_step(3)
    killed_at = run.kill(module)
    run.wait_for_recovery(killed_at)
    run.finish()
    assert run.output().count("killed by SIGKILL; restart 1 of 5 in 1 s") == 1
    assert {row["lineage"] for row in run.rows("step")} == {0}
    report(f"SIGKILL of the {module.rpartition('.')[2]}", promise, run.assert_survived(killed_at))


@pytest.mark.full
def test_a_learner_that_is_killed_trains_the_very_groups_again_and_knows_their_path(
    start_run: Callable[..., Run], report: Report
) -> None:
    run = start_run(*SHORT, "learner.checkpoint_every=6", "learner.keep_checkpoints=50", "max_staleness=8")
    run.wait_for_step(7)
    run.wait_until(lambda: _has_outlived_a_checkpoint(run), "groups of weights that the kill undoes")
    killed_at = run.kill("learner")
    before = trained(run.directory)
    run.wait_for_recovery(killed_at)
    branch = lineages(run.directory).branches[1]
    assert branch is not None
    assert branch.number >= 6
    undone = [visit for step, found in before.items() if step.number >= branch.number for visit in found]
    assert undone
    run.wait_until(lambda: _were_served(run, undone), "what was undone to be trained")
    run.finish()
    _assert_trained_again(run, undone)
    _assert_staleness_is_the_length_of_the_path(run, branch)
    report(
        "SIGKILL of the learner",
        "it goes on from its newest checkpoint in a new lineage; the very groups trained since are trained again",
        run.assert_survived(killed_at),
    )


@pytest.mark.full
def test_a_launcher_that_is_killed_leaves_no_process_and_its_command_goes_on(
    start_run: Callable[..., Run], report: Report
) -> None:
    run = start_run(*SHORT, "learner.checkpoint_every=2", "run.resume=auto")
    run.wait_for_step(4)
    children = psutil.Process(run.launcher.pid).children(recursive=True)
    assert len(children) > 6
    killed_at = run.kill_launcher()
    wait_until(lambda: not living(children), "every process to end")
    assert run.audit().returncode == 0

    resumed = start_run(*SHORT, "learner.checkpoint_every=2", "run.resume=auto")
    resumed.wait_for_recovery(killed_at)
    resumed.finish()
    report(
        "SIGKILL of the launcher",
        "every process ends with it; the same command goes on (seconds: it is given at once)",
        resumed.assert_survived(killed_at),
    )


def _lineage(visit: Visit) -> int:
    """Of the step that trained it."""
    assert visit.step is not None
    return visit.step.lineage


def _has_outlived_a_checkpoint(run: Run) -> bool:
    """Whether steps were trained since the newest checkpoint, and groups sampled by weights that they made."""
    found = run.directory.glob("checkpoints/step-*/version.json")
    newest = max((int(path.parent.name.removeprefix("step-")) for path in found), default=1000)
    stored = (visit for visit in visits(run.directory) if visit.state in (VisitState.SCORED, VisitState.TRAINED))
    return any(version.number > newest for visit in stored for version in visit.versions)


def _were_served(run: Run, undone: list[Visit]) -> bool:
    """Whether each is trained in the new lineage, or expired there: its path has become too long."""
    now = {visit.number: visit for visit in visits(run.directory)}
    return all(
        now[v.number].pinned or (now[v.number].state is VisitState.TRAINED and _lineage(now[v.number]) == 1)
        for v in undone
    )


def _assert_trained_again(run: Run, undone: list[Visit]) -> None:
    """In the new lineage, each once, and the groups that were sampled before: there is no other attempt."""
    after = {visit.number: visit for visit in visits(run.directory)}
    served = [visit for visit in undone if not after[visit.number].pinned]
    assert len(served) > len(undone) / 2
    for visit in served:
        now = after[visit.number]
        assert (now.attempt, now.versions, now.granted_at) == (visit.attempt, visit.versions, visit.granted_at)
        assert now.state is VisitState.TRAINED, now
        assert _lineage(now) == 1


def _assert_staleness_is_the_length_of_the_path(run: Run, branch: Version) -> None:
    """Of each completion of the new lineage; by the numbers of versions alone it would be another in some step."""
    rows = {row["step"]: row for row in run.rows("step") if row["lineage"] == 1}
    num_that_differ = 0
    for step, found in trained(run.directory).items():
        if step.lineage == 1 and step.number + 1 in rows:
            stalest = _versions(run.directory, found)
            by_path = mean(max(_path(v, step, branch) for v in versions) for versions in stalest)
            by_number = mean(max(step.number - v.number for v in versions) for versions in stalest)
            assert rows[step.number + 1]["staleness_mean"] == pytest.approx(by_path)
            num_that_differ += by_number != by_path
    assert num_that_differ


def _path(version: Version, current: Version, branch: Version) -> int:
    if version.lineage == current.lineage:
        return current.number - version.number
    return current.number - branch.number + abs(version.number - branch.number)


def _versions(run_dir: Path, found: list[Visit]) -> list[list[Version]]:
    """Those that sampled each completion of the visits."""
    store = Store(run_dir, read_only=True)
    try:
        groups = [store.payload(visit.number).group for visit in found]
    finally:
        store.close()
    return [[span.version for span in completion.spans()] for group in groups for completion in group.completions]
