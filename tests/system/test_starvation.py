"""One prompt in ten answers 50 times longer than the rest, and has its share of what a real run trains."""

import json
import math
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from common import wire
from learner.record import SAMPLES
from tests.system.chain import LONG_FACTOR, NUM_LONG, NUM_PROMPTS, is_long, write_chain
from tests.system.conftest import Run

pytestmark = [pytest.mark.full, pytest.mark.learning]

STEPS, GROUPS, MAX_STALENESS = 200, 4, 1


class Visit(NamedTuple):
    """A visit of the run, as its file has it."""

    is_long: bool
    state: str
    is_pinned: bool


def visits_of(run: Run) -> list[Visit]:
    """All visits that were handed out, in order."""
    sql = sqlite3.connect(run.directory / "ledger.sqlite")
    prompts = {
        row: is_long(msgspec.msgpack.decode(data, type=wire.Prompt).id)
        for row, data in sql.execute("SELECT id, data FROM prompts")
    }
    rows = sql.execute("SELECT prompt, state, pinned FROM visits ORDER BY number").fetchall()
    sql.close()
    return [Visit(prompts[prompt], state, bool(pinned)) for prompt, state, pinned in rows]


def samples(run: Run) -> list[dict[str, Any]]:
    """One group of each step, completion by completion."""
    return [json.loads(line) for line in (run.directory / SAMPLES).read_text().splitlines()]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _sampling_error(num: int) -> float:
    """Three standard deviations of the share of long prompts among `num` that are drawn one by one.

    Which come first is the seed's: the same in each run.
    """
    share = NUM_LONG / NUM_PROMPTS
    return 3 * math.sqrt(share * (1 - share) / num)


def test_long_answers_have_their_share_of_what_is_trained(start_run: Callable[..., Run], tmp_path: Path) -> None:
    directory = write_chain(tmp_path)
    run = start_run(
        f"model={directory / 'model'}",
        f"data.train={directory / 'train.jsonl'}",
        f"steps={STEPS}",
        "group_size=4",
        f"groups_per_step={GROUPS}",
        "updates_per_step=1",
        f"max_staleness={MAX_STALENESS}",
        "sampling.max_tokens=2000",
        "loss.filter_uniform=false",
        "optimizer.lr=1e-9",  # the chain stays as it is
        f"learner.checkpoint_every={STEPS}",
        "learner.max_tokens_per_microbatch=16384",
    )
    assert run.wait() == 0
    run.assert_sound()
    lengths = {
        long: _mean(row["versions"][-1][0] for row in samples(run) if is_long(row["prompt_id"]) == long)
        for long in (True, False)
    }
    # Some 80 samples of an exponential law, 50 times as long: their mean is below 0.4 of it once in ten billion runs.
    assert lengths[True] > 0.4 * LONG_FACTOR * lengths[False]
    visits = visits_of(run)
    expired = [visit for visit in visits if visit.is_pinned]
    assert sum(visit.is_long for visit in expired) > STEPS / 20
    # Visits handed out before the last 3 * eta + 1 steps, of which there are at least as many as groups were trained by
    # then, have all had their two windows (tests/learner/ledger/test_ledger_starvation.py).
    due = visits[: (STEPS - 3 * MAX_STALENESS - 1) * GROUPS]
    assert {visit.state for visit in due} == {"trained"}
    assert abs(_mean(visit.is_long for visit in due) - NUM_LONG / NUM_PROMPTS) <= _sampling_error(len(due))
    rows = run.rows("step")
    assert sum(row["num_groups_expired"] for row in rows) == sum(v.is_pinned and v.state == "trained" for v in visits)
    assert max(row["expired_tokens_p50"] or 0 for row in rows) > 10 * lengths[False]
    pins = [row["pin_wait_s"] for row in run.rows("step")]
    assert all(0 <= pin <= row["seconds"] for pin, row in zip(pins, run.rows("step"), strict=True))
    assert sum(pin > 0 for pin in pins) > STEPS / 20
