"""Messages that are lost, and a network that is cut and mended."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from uuid import uuid4

import pytest

from learner.ledger.visits import Visit
from tests.system.accounts import Cost, visits
from tests.system.conftest import ENDLESS, HANG_S, REPOSITORY, Run

pytestmark = [pytest.mark.full, pytest.mark.faults]

TIMEOUT_S = 10
LOSSY = Path(__file__).with_name("lossy")
HERE, THERE = "10.213.0.1", "10.213.0.2"  # in networks of their own: other tests may have the same
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


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them, whose ends have the addresses HERE and THERE."""
    if os.geteuid() != 0 or which("ip") is None:
        pytest.skip("network namespaces are made by root alone, with iproute2's `ip`")
    here, there = (f"sluice-{end}-{uuid4().hex}" for end in ("a", "b"))
    try:
        for name in (here, there):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", here, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", there)
        for name, address in ((here, HERE), (there, THERE)):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
        yield here, there
    finally:
        for name in (here, there):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_a_generator_behind_a_network_that_is_cut_and_mended_joins_again(
    start_run: Callable[..., Run], namespaces: tuple[str, str], report: Callable[[str, str, Cost], None]
) -> None:
    here, there = namespaces
    run = start_run(*SHORT, f"run.host={HERE}", prefix=("ip", "netns", "exec", here))
    run.wait_for_step(1)
    command = ["ip", "netns", "exec", there, sys.executable, "-m", "generator", str(run.directory), "generator-1"]
    with (run.directory / "logs" / "generator-1.out").open("wb") as output:
        distant = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output, start_new_session=True)
    try:
        run.wait_until(lambda: _leases(run, "generator-1"), "generator-1 to have leases")
        _ip("-n", here, "link", "set", "cable", "down")
        cut_at = time.time()
        run.wait_until(lambda: run.was_lost("generator-1"), "the ledger to give up generator-1")
        run.wait_until(lambda: not _leases(run, "generator-1"), "its leases to end")
        run.wait_for_steps(3)
        _ip("-n", here, "link", "set", "cable", "up")
        mended_at = time.time()
        run.wait_until(lambda: _leases(run, "generator-1", since=mended_at), "generator-1 to have leases again")
        run.wait_for_steps(3)
        distant.terminate()
        assert distant.wait(HANG_S) == 0, (run.directory / "logs" / "generator-1.out").read_text()[-2000:]
        run.finish()
    finally:
        distant.kill()
    report(
        "the network between a generator and the rest is cut for longer than its leases, then mended",
        "its leases go to others, it joins again",
        run.assert_survived(cut_at),
    )


def _leases(run: Run, holder: str, since: float = 0.0) -> list[Visit]:
    return [visit for visit in visits(run.directory) if visit.holder == holder and visit.granted_at > since]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
