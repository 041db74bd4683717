"""The order of the data: which prompt a visit is of, by seed alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PromptRange:
    """The prompts of one file: rows `first` to `first + num_prompts - 1` of the store, and its weight."""

    first: int
    num_prompts: int
    weight: float


class DataOrder:
    """An endless order of prompts: files interleaved by weight, each shuffled anew every epoch.

    After n visits a file with share w of the weights has had n * w of them, give or take one. Positions are asked for
    in ascending order mostly; what was asked for before is computed anew from position 0.
    """

    def __init__(self, files: list[PromptRange], *, seed: int, shuffle: bool) -> None:
        """`seed` decides the whole order."""
        assert files
        self._files, self._seed, self._shuffle = files, seed, shuffle
        self._shares = np.array([file.weight for file in files]) / sum(file.weight for file in files)
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self._restart()

    def prompt(self, position: int) -> int:
        """The row of the prompt at a position."""
        if len(self._files) == 1:
            return self._row(0, position)
        if position < self._position:
            self._restart()
        while True:
            file = int(np.argmax(self._shares * (self._position + 1) - self._taken))
            index = int(self._taken[file])
            self._taken[file] += 1
            self._position += 1
            if self._position > position:
                return self._row(file, index)

    def _restart(self) -> None:
        self._position = 0
        self._taken = np.zeros(len(self._files), dtype=np.int64)

    def _row(self, file: int, index: int) -> int:
        prompts = self._files[file]
        epoch, offset = divmod(index, prompts.num_prompts)
        if not self._shuffle:
            return prompts.first + offset
        if self._orders.get(file, (-1,))[0] != epoch:
            draws = np.random.default_rng(np.random.SeedSequence([self._seed, file, epoch]))
            self._orders[file] = (epoch, draws.permutation(prompts.num_prompts))
        return prompts.first + int(self._orders[file][1][offset])


class Epochs:
    """How often the prompts have been visited."""

    def __init__(self, files: Mapping[str, PromptRange]) -> None:
        """`files` are those to train on, by name."""
        self._files = files
        self._num_prompts = sum(file.num_prompts for file in files.values())
        self._weights = sum(file.weight for file in files.values())

    def total(self, num_visits: int) -> float:
        """Visits handed out, in prompts."""
        return num_visits / self._num_prompts

    def of_files(self, num_visits: int) -> dict[str, float]:
        """The same of each file, which has its share of the visits, give or take one."""
        return {name: num_visits * file.weight / self._weights / file.num_prompts for name, file in self._files.items()}
