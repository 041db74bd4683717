"""What tests of checkpoints share: tiny policies, commits, and damage."""

from collections.abc import Iterator
from pathlib import Path

import torch

from common import wire
from common.config import Config, DataConfig, LearnerConfig, RunConfig
from common.versions import Version
from learner.checkpoints import Checkpoints
from learner.saved import SavePoint
from learner.sharded import State, read
from learner.sums import sums_of


class Weights:
    """A policy of one number, many times: enough for a directory."""

    def __init__(self, value: float = 0, num_tensors: int = 1) -> None:
        self.values = {f"value.{i}": torch.full((1 << 18,), value) for i in range(num_tensors)}

    def snapshot(self) -> State:
        return {name: tensor.clone() for name, tensor in self.values.items()}

    def load(self, path: Path) -> None:
        read(path, self.values)

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.values.items()


def make_config(run_dir: Path, stall_timeout_s: float = 60, **learner: int) -> Config:
    return Config(
        model=str(run_dir / "model"),
        data=DataConfig(train="x"),
        run=RunConfig(stall_timeout_s=stall_timeout_s),
        learner=LearnerConfig(**{"keep_checkpoints": 2} | learner),
    )


def commit(number: int) -> wire.Committed:
    return wire.Committed(sequence=number, num_visits=10 * number)


def saved(checkpoints: Checkpoints, *numbers: int) -> None:
    for number in numbers:
        checkpoints.save(Weights(number), Version(0, number), commit(number))
        found = checkpoints.finish()
        assert found is not None
        assert found.version == Version(0, number)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def mark_saved(checkpoint: Path, version: Version) -> None:
    """Makes a checkpoint of what is in `megatron/`."""
    files = sums_of((checkpoint / "megatron").iterdir())
    SavePoint(version=version, sequence=version.number, num_visits=0, run="run", files=files).write(checkpoint)


def flip_a_bit(path: Path) -> None:
    """In the middle of a file, whose size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
