"""The position in the data: no visit is skipped or repeated, whatever dies, over several epochs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import wire
from common.config import Config
from common.learning import LearnerConfig
from common.sections import DataConfig, DataFile
from common.versions import Version
from common.wire import VisitState
from learner.ledger.evaluations import EvaluationChanges
from learner.ledger.order import DataOrder, Epochs, PromptRange
from learner.ledger.prompts import prepare
from learner.ledger.state import Ledger
from learner.ledger.store import Store
from tests.learner.ledger.rules import MakeGroup

MakeRun = Callable[..., tuple[Path, Config]]
NUM_EPOCHS = 5
NOTHING = EvaluationChanges([], [], [])


class Life:
    """A run whose ledger is killed, before and after what it did is stored, and whose learner resumes."""

    def __init__(self, run_dir: Path, config: Config, make_group: MakeGroup, seed: int) -> None:
        self.run_dir, self.config, self.make_group = run_dir, config, make_group
        self.random = np.random.default_rng(seed)
        self.store = Store(run_dir)
        prepare(self.store, config)
        self.ledger: Ledger = self.store.ledger(config, 0.0)
        self.checkpoints: list[tuple[Version, int, int]] = []
        self.num_kills = self.num_resumes = self.sequence = 0
        self.act(lambda: self.ledger.begin(None))

    def act(self, action: Callable[[], Any]) -> Any:
        """One call and the end of its transaction; now and then the ledger dies before it, or after it."""
        before, moment = self.sequence, self.random.random()
        answer = action()
        if moment > 0.1:
            self.store.save(self.ledger.drain(), NOTHING)
        if moment < 0.2:
            self.num_kills += 1
            self.store.close()
            self.store = Store(self.run_dir)
            self.ledger = self.store.ledger(self.config, 0.0)
        if moment < 0.1:
            self.sequence = before
            return None
        return answer

    def go_on(self) -> None:
        """Something that happens in a run."""
        current = self.ledger.track.current
        if current is None:
            self.act(lambda: self.ledger.begin(None))
            return
        for visit in self.act(lambda: self.ledger.grant("g", current, int(self.random.integers(1, 4)), 0.0)) or []:
            group = self.make_group(visit.key, current)
            self.act(lambda group=group: self.ledger.store(group, wire.encode(group)))
        if self.random.random() < 0.1:
            self.act(lambda: self.ledger.free("g"))
        if self.act(lambda: self.ledger.reserve(current, 2)):
            self.step(current)
        if self.checkpoints and self.random.random() < 0.1:
            self.resume()

    def step(self, current: Version) -> None:
        visits = tuple(visit.number for visit in self.ledger.visits(VisitState.RESERVED))
        sequence = self.act(lambda: self.ledger.commit(current, visits))
        if sequence is None:
            return
        self.sequence = sequence
        if self.random.random() < 0.5:
            self.act(lambda: self.ledger.checkpoint(current.next()))
            self.checkpoints = [*self.checkpoints, (current.next(), sequence, self.ledger.head().num_visits)][-2:]

    def resume(self) -> None:
        """From the newest checkpoint or the one before: visits that were handed out stay so."""
        kept = self.checkpoints[: int(self.random.integers(1, len(self.checkpoints) + 1))]
        before = self.ledger.head().num_visits
        if self.act(lambda: self.ledger.begin(*kept[-1])) is not None:
            self.checkpoints, self.num_resumes = kept, self.num_resumes + 1
            assert self.ledger.head().num_visits == before


@pytest.mark.parametrize("num_files", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_each_prompt_is_visited_once_an_epoch_whatever_dies(
    num_files: int, seed: int, make_run: MakeRun, make_group: MakeGroup, write_rows: Callable[..., Path]
) -> None:
    sizes, weights = (20, 8)[:num_files], (3.0, 1.0)[:num_files]
    files = [
        DataFile(
            path=str(write_rows(f"{i}.jsonl", [{"prompt": f"{i}+{n}=", "answer": n} for n in range(sizes[i])])),
            weight=weights[i],
        )
        for i in range(num_files)
    ]
    settings = {"max_staleness": 3, "learner": LearnerConfig(keep_checkpoints=2), "seed": seed}
    run_dir, config = make_run(data=DataConfig(train=files, test=""), **settings)
    life = Life(run_dir, config, make_group, seed)
    while life.ledger.head().num_visits < NUM_EPOCHS * sum(sizes):
        life.go_on()
    assert life.num_kills > 10
    assert life.num_resumes > 1
    rows = life.store.rows("SELECT visits.number, visits.prompt, file FROM visits JOIN prompts ON prompts.id = prompt")
    visited = [row for _, row, _ in sorted(rows)]
    assert [number for number, _, _ in sorted(rows)] == list(range(life.ledger.head().num_visits))
    firsts = [(1, 20, 3.0), (21, 8, 1.0)][:num_files]
    order = DataOrder([PromptRange(*each) for each in firsts], seed=seed, shuffle=True)
    assert visited == [order.prompt(position) for position in range(len(visited))], "they go on where they were"
    for first, size, _ in firsts:
        own = [row for row in visited if first <= row < first + size]
        for start in range(0, len(own), size):
            epoch = own[start : start + size]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < size or sorted(epoch) == list(range(first, first + size))
    _check_what_is_reported(life.store.epochs(), visited, sizes)


def _check_what_is_reported(epochs: Epochs, visited: list[int], sizes: tuple[int, ...]) -> None:
    assert epochs.total(len(visited)) == len(visited) / sum(sizes)
    counts = [sum(row <= 20 for row in visited), sum(row > 20 for row in visited)]
    of_files = epochs.of_files(len(visited))
    assert list(of_files) == ["0", "1"][: len(sizes)]
    for told, count, size in zip(of_files.values(), counts, sizes, strict=False):
        assert abs(told * size - count) <= 1
