"""`max_staleness=0` is the synchronous algorithm: a plain loop over the groups that a run recorded gives the same."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common import wire
from common.layout import read_resolved
from common.versions import Lineages, Version
from learner.ledger.store import Store
from learner.megatron.policy import Policy
from learner.saved import MEGATRON
from learner.sharded import read, sizes, write
from learner.step import train_step
from tests.ranks import run_ranks
from tests.system.conftest import Run

pytestmark = [pytest.mark.full, pytest.mark.learning]

NUM_STEPS = 20
SMALL = ("max_staleness=0", "groups_per_step=4", "group_size=8", "updates_per_step=2", "learner.checkpoint_every=100")
REPLAYED, ROWS = "replayed", "rows.json"
Steps = list[tuple[wire.TrainingGroup, ...]]


def test_a_run_without_staleness_equals_a_plain_synchronous_loop_bit_for_bit(
    start_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = start_run(f"steps={NUM_STEPS}", "evaluation.every=100", *SMALL, name="first")
    assert run.wait() == 0
    run.assert_sound()
    steps = recorded(run.directory)
    assert len(steps) == NUM_STEPS
    for number, groups in enumerate(steps):
        assert {span.version for group in groups for c in group.scored.group.completions for span in c.spans()} == {
            Version(0, number)
        }
    run_ranks(1, tmp_path, replay, run.directory, tmp_path)
    rows = json.loads((tmp_path / ROWS).read_text())
    names = rows[0].keys() - {name for name in rows[0] if name.endswith("_s")}
    for row, replayed in zip(run.rows("step"), rows, strict=True):
        assert {name: row[name] for name in names} == {name: replayed[name] for name in names}
        assert replayed["grad_norm"] > 0
        assert replayed["staleness_max"] == 0
    trained = tensors(run.directory / "checkpoints" / f"step-{NUM_STEPS:06d}" / MEGATRON)
    replayed = tensors(tmp_path / REPLAYED)
    assert trained.keys() == replayed.keys()
    assert all(torch.equal(tensor, replayed[name]) for name, tensor in trained.items())
    _check_that_another_run_samples_the_same(run, start_run)


def recorded(run_dir: Path) -> Steps:
    """The groups of each step, in the order in which they were trained: by the numbers of their visits."""
    store = Store(run_dir, read_only=True)
    rows = store.rows("SELECT step, number, prompt FROM visits WHERE state = 'trained' ORDER BY number")
    steps: dict[str, list[wire.TrainingGroup]] = {}
    for step, number, prompt in rows:
        scored = store.payload(number)
        assert scored is not None, "a trained group is kept until no resume can need it"
        steps.setdefault(step, []).append(wire.TrainingGroup(prompt=store.prompt(prompt), scored=scored))
    store.close()
    return [tuple(steps[str(Version(0, number))]) for number in range(len(steps))]


def replay(run_dir: Path, directory: Path) -> None:
    """A plain loop over what the run trained: writes its figures, as metrics.jsonl has them, and its last weights."""
    config = read_resolved(run_dir)
    policy, rows = Policy(config), []
    for number, groups in enumerate(recorded(run_dir)):
        figures = train_step(policy, groups, config, Version(0, number), Lineages())
        rows.append({name: float(value) if math.isfinite(value) else None for name, value in figures.items()})
    write(directory / REPLAYED, policy.snapshot(), None)
    (directory / ROWS).write_text(json.dumps(rows))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint, by name."""
    state = {name: torch.empty(size) for name, size in sizes(path).items() if not name.startswith("random.")}
    read(path, state)
    return state


def _check_that_another_run_samples_the_same(run: Run, start_run: Callable[..., Run]) -> None:
    """Two runs with one seed sample the same tokens; their losses differ by the rounding of other batches at most."""
    again = start_run("steps=4", "evaluation.every=100", *SMALL, name="second")
    assert again.wait() == 0
    again.assert_sound()
    lines = [(each.directory / "samples.jsonl").read_text().splitlines()[:4] for each in (run, again)]
    samples = [[(sample["prompt_id"], sample["text"]) for sample in map(json.loads, part)] for part in lines]
    assert samples[0] == samples[1]
    norms = [[row["grad_norm"] for row in each.rows("step")[:4]] for each in (run, again)]
    assert np.allclose(norms[0], norms[1], rtol=1e-4)
