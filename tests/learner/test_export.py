"""`python -m learner.export`: what is wrong is one line, and nothing half-written is left."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from common.config import Config, DataConfig
from common.errors import ModelError, RunDirectoryError
from common.layout import write_resolved
from common.versions import Version
from learner import export
from learner.export import export_checkpoint, write_hugging_face
from learner.ranks import Ranks
from learner.sharded import write
from tests.clocks import PATIENCE_S
from tests.learner.saves import flip_a_bit, mark_saved
from tests.learner.test_checkpoints import REPOSITORY, limited_files
from tests.ranks import run_ranks

WEIGHTS = {"b.weight": torch.arange(60_000.0).view(300, 200), "a.weight": torch.ones(3)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a run whose model has a config, a tokenizer and weights of its own."""
    model, path = tmp_path / "model", tmp_path / "run" / "checkpoints" / "step-000007"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors"):
        (model / name).write_text("{}")
    path.mkdir(parents=True)
    write_resolved(Config(model=str(model), data=DataConfig(train="x")), tmp_path / "run")
    state = {f"weight.{name}": tensor for name, tensor in WEIGHTS.items()} | {"exp_avg.a.weight": torch.zeros(3)}
    write(path / "megatron", state, None)
    mark_saved(path, Version(0, 7))
    return path


def test_the_command_exports_the_best_checkpoint_with_all_that_is_no_weight(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint.parent / "best").symlink_to(checkpoint.name)
    command = [sys.executable, "-m", "learner.export", str(checkpoint.parent / "best"), str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 0, ended.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == WEIGHTS.keys()
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in exported.items())


def test_many_weights_come_in_shards_with_an_index(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.export.SHARD_BYTES", 100_000)
    export_checkpoint(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    exported = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        exported |= load_file(path)
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in exported.items())
    assert exported.keys() == WEIGHTS.keys()


def test_a_missing_or_half_written_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"step-000009: found no version.json, expected a whole checkpoint"):
        export_checkpoint(checkpoint.with_name("step-000009"), tmp_path / "out")
    (checkpoint / "megatron" / ".metadata").unlink()
    with pytest.raises(RunDirectoryError, match=r"megatron/.metadata: cannot be read: No such file"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_a_file_is_refused_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    next((checkpoint / "megatron").glob("*.distcp")).unlink()
    with pytest.raises(RunDirectoryError, match=r"megatron/__0_0.distcp: cannot be read: No such file") as caught:
        export_checkpoint(checkpoint, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_the_command_refuses_a_damaged_checkpoint_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    flip_a_bit(checkpoint / "megatron" / "__0_0.distcp")
    command = [sys.executable, "-m", "learner.export", str(checkpoint), str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "megatron/__0_0.distcp: found checksum " in ended.stderr
    assert not list(tmp_path.glob("*out*"))


def test_a_directory_that_is_in_use_is_refused_and_an_empty_one_is_not(checkpoint: Path, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").touch()
    for target in (used, used / "notes.txt"):
        with pytest.raises(RunDirectoryError, match="found something there, expected a new or empty directory"):
            export_checkpoint(checkpoint, target)
    assert [path.name for path in used.iterdir()] == ["notes.txt"]
    (used / "notes.txt").unlink()
    assert export_checkpoint(checkpoint, used) == 60_003 * 4


def test_the_working_directory_may_be_the_empty_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_checkpoint(checkpoint, Path())
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_checkpoint_that_was_moved_out_of_its_run_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(checkpoint, tmp_path / "step-000007"))
    elsewhere = tmp_path / "elsewhere" / "checkpoints" / "step-000007"
    shutil.copytree(moved, elsewhere)
    for path in (moved, elsewhere):
        with pytest.raises(RunDirectoryError, match=r"found a checkpoint in .*, expected one in RUN/checkpoints"):
            export_checkpoint(path, tmp_path / "out")


def test_all_ranks_hear_that_the_disk_of_one_is_full(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    run_ranks(2, tmp_path, _write_with_a_full_disk, tmp_path)
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert told[0].startswith(f"{tmp_path / 'out'}: cannot be written: ")
    assert not list(tmp_path.glob("*out*"))


def _write_with_a_full_disk(directory: Path) -> None:
    """The second rank's disk is full, and its weights are made by both."""
    rank = dist.get_rank()

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(3):
            weight = torch.ones(100_000)
            dist.all_reduce(weight)
            yield f"{rank}.{number}", weight

    export.SHARD_BYTES = 1
    with limited_files(50_000 if rank == 1 else 1 << 30), pytest.raises(RunDirectoryError) as caught:
        write_hugging_face(weights(), directory / "model", directory / "out", Ranks())
    (directory / f"told-{rank}").write_text(str(caught.value))


def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with limited_files(50_000), pytest.raises(RunDirectoryError, match="out: cannot be written: ") as caught:
        export_checkpoint(checkpoint, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_a_model_that_is_gone_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"run/config.json: model: found .*/model without config.json, expected"):
        export_checkpoint(checkpoint, tmp_path / "out")
