"""The checkpoints' directory: whole or absent, the newest few, and the best."""

from pathlib import Path

import pytest
import torch

from common.config import Config, DataConfig, LearnerConfig
from common.errors import RunDirectoryError
from common.versions import Version
from learner.checkpoints import Checkpoints
from learner.ranks import Ranks


class Weights:
    """A policy of one number: enough for a directory."""

    def __init__(self) -> None:
        self.value = torch.zeros(1)

    def save(self, path: Path) -> None:
        path.mkdir()
        torch.save(self.value, path / "value")

    def load(self, path: Path) -> None:
        self.value = torch.load(path / "value")

    def export(self):  # noqa: ANN201
        yield "value", self.value


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    model = str(tmp_path / "model")
    return Config(model=model, data=DataConfig(train="x"), learner=LearnerConfig(keep_checkpoints=2))


def saved(checkpoints: Checkpoints, *numbers: int) -> None:
    for number in numbers:
        policy = Weights()
        policy.value += number
        checkpoints.save(policy, Version(0, number))  # type: ignore[arg-type]


def test_the_newest_few_and_the_best_are_kept_and_the_newest_is_loaded(config: Config, tmp_path: Path) -> None:
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    saved(checkpoints, 10)
    checkpoints.mark_best(Version(0, 10), 0.7)
    saved(checkpoints, 20, 30, 40)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best", "step-000010", "step-000030", "step-000040"]
    policy = Weights()
    assert Checkpoints(config, tmp_path, Ranks()).load_newest(policy) == Version(0, 40)  # type: ignore[arg-type]
    assert float(policy.value) == 40


def test_a_worse_checkpoint_is_never_the_best_also_after_a_restart(config: Config, tmp_path: Path) -> None:
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    saved(checkpoints, 1, 2)
    checkpoints.mark_best(Version(0, 1), 0.7)
    Checkpoints(config, tmp_path, Ranks()).mark_best(Version(0, 2), 0.6)
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-000001"
    checkpoints.mark_best(Version(0, 2), float("nan"))
    checkpoints.mark_best(Version(0, 9), 0.9)  # has no checkpoint
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-000001"
    checkpoints.mark_best(Version(0, 2), 0.8)
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-000002"


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(config: Config, tmp_path: Path) -> None:
    class Full(Weights):
        def save(self, path: Path) -> None:
            super().save(path)
            raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(config, tmp_path, Ranks())
    with pytest.raises(RunDirectoryError, match=r"step-000001: cannot be written: No space left on device"):
        checkpoints.save(Full(), Version(0, 1))  # type: ignore[arg-type]
    assert list((tmp_path / "checkpoints").iterdir()) == []
