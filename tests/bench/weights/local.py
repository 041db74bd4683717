"""`python -m tests.bench weights.local`: what an update costs in the local layout, learner and generator: medians."""

import statistics

from tests.bench.local import EQUAL_WORK, WARM_UP_STEPS, MeasuredRun
from tests.bench.report import Figure

BFLOAT16 = ("learner.dtype=bfloat16", "generator.dtype=bfloat16")


def run() -> list[Figure]:
    """In float32, as the layout has it, and in bfloat16."""
    figures: list[Figure] = []
    for dtype, overrides in (("float32", ()), ("bfloat16", BFLOAT16)):
        measured = MeasuredRun(*EQUAL_WORK, *overrides)
        rows = [row for row in measured.rows if row["kind"] == "step"][WARM_UP_STEPS:]

        def median(name: str, of: str = "") -> float:
            values = [row[name] / (row[of] if of else 1.0) for row in rows if row[name] is not None]  # noqa: B023
            return statistics.median(values) if values else float("nan")

        figures += [
            Figure(f"{dtype}: the snapshot", 100 * median("snapshot_s", "seconds"), "% of the step"),
            Figure(f"{dtype}: the probe", 100 * median("probe_s", "seconds"), "% of the step"),
            Figure(
                f"{dtype}: waiting for the version before", 100 * median("encode_wait_s", "seconds"), "% of the step"
            ),
            Figure(f"{dtype}: encoding beside training", 1000 * median("encode_s"), "ms"),
            Figure(f"{dtype}: elements that change", 100 * median("changed_share"), "%"),
            Figure(f"{dtype}: bytes of a delta", 100 * median("delta_share"), "% of full"),
            *(
                Figure(f"{dtype}: {name}, mean of the generators", 1000 * median(f"weights_{name}_s"), "ms")
                for name in ("transfer", "decode", "pause")
            ),
        ]
    return figures
