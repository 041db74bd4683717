"""`python -m tests.bench.starvation`: what pinning does for prompts that are answered slowly, and what it costs.

Simulated time on the real state machine: one prompt in ten answers 50 times longer than the rest.
"""

import sys

from tests.learner.ledger.fleets import STEPS, Simulation, Times, share, simulation_config, wait_bound

GROUPS_PER_STEP = 4
TIMES = Times(num_slots=64, step_s=4.0, load_s=0.5)
SEEDS = range(5)


def main() -> None:
    """Writes a table in Markdown."""
    sys.stdout.write("| max_staleness | share of long groups, pinned | not pinned | s a step, pinned | not pinned |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for max_staleness in (1, 2, 4, 8):
        cells = [_measure(max_staleness, pins=pins) for pins in (True, False)]
        shares, seconds = zip(*cells, strict=True)
        row = [str(max_staleness), *(f"{s:.3f}" for s in shares), *(f"{s:.1f}" for s in seconds)]
        sys.stdout.write(f"| {' | '.join(row)} |\n")


def _measure(max_staleness: int, *, pins: bool) -> tuple[float, float]:
    """Share of long groups among the trained, and seconds a step, means over the seeds."""
    config = simulation_config(max_staleness, GROUPS_PER_STEP)
    runs = [Simulation(config, TIMES, seed=seed, pins=pins) for seed in SEEDS]
    for run in runs:
        run.run(wait_bound(max_staleness) + STEPS)
    return sum(map(share, runs)) / len(runs), sum(run.now / run.version.number for run in runs) / len(runs)


if __name__ == "__main__":
    main()
