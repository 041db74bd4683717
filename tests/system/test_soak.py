"""Ten minutes in which something is killed or stands still every few seconds."""

import random
import time
from collections import Counter
from collections.abc import Callable

import pytest

from tests.system.accounts import Cost
from tests.system.conftest import Run

pytestmark = [pytest.mark.full, pytest.mark.faults]

SECONDS = 600
SEED = 7
PAUSE_S = (5, 20)
STAND_STILL_S = (1, 8)  # the lease's silence is between the two
NAMES = {"ledger": "ledger", "learner": "learner-0", "generator": "generator-0", "verifier": "verifier-0"}
MODULES = {"ledger": "learner.ledger", "learner": "learner", "generator": "generator", "verifier": "verifier"}


def test_ten_minutes_of_random_faults_lose_nothing(
    start_run: Callable[..., Run], report: Callable[[str, str, Cost], None]
) -> None:
    run = start_run(
        "steps=100000",
        "groups_per_step=8",
        "evaluation.every=100000",
        "learner.checkpoint_every=2",
        "lease.heartbeat_timeout_s=5",
        "run.max_restarts=1000",
    )
    run.wait_for_step(1)
    faults = _torment(run)
    run.wait_for_recovery(time.time())
    run.finish()
    seen = run.assert_survived(None)
    trained = run.summary()["groups"]["trained"]
    counts = ", ".join(f"{fault} {num}" for fault, num in sorted(faults.items()))
    figures = f"{counts}; {run.summary()['steps']} steps, {trained} groups trained"
    report("ten minutes of faults, one every 5 to 20 s", f"all of the above at once: {figures}", seen)


def _torment(run: Run) -> Counter[str]:
    """Kills, or lets stand still, one process after the other; returns how often which."""
    chance, until = random.Random(SEED), time.monotonic() + SECONDS
    faults, num_lives = Counter[str](), dict.fromkeys(MODULES, 0)
    while time.monotonic() < until:
        time.sleep(chance.uniform(*PAUSE_S))
        assert run.launcher.poll() is None
        ready = {role: len(run.events(name, "ready")) for role, name in NAMES.items()}
        at_work = [role for role in MODULES if ready[role] > num_lives[role]]
        if not at_work:
            continue  # all come up just now
        role = chance.choice(at_work)
        if kills := chance.random() < 0.75:
            run.kill(MODULES[role])
            num_lives[role] = ready[role]
        else:
            run.stop(MODULES[role])
            time.sleep(chance.uniform(*STAND_STILL_S))
            run.go_on(MODULES[role])
        faults[f"{role} {'killed' if kills else 'stopped'}"] += 1
    return faults
