"""The checkpoints' directory: whole or absent, the newest few, every so many, and the best; saves beside training."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch

from common.config import Config
from common.errors import RunDirectoryError, StallError
from common.rendezvous import RunKeys
from common.versions import Version
from learner import saving
from learner.checkpoints import Checkpoints
from learner.ranks import Ranks
from learner.saved import SavePoint
from tests.learner.saves import Weights, commit, make_config, names, saved

REPOSITORY = Path(__file__).resolve().parents[2]
KILLED_AT_BYTES = 3 << 20


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    RunKeys.create(tmp_path)
    return make_config(tmp_path)


def test_the_newest_few_and_the_best_are_kept_and_the_newest_is_loaded(config: Config, tmp_path: Path) -> None:
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    saved(checkpoints, 10)
    checkpoints.mark_best(Version(0, 10), 0.7)
    saved(checkpoints, 20, 30, 40)
    assert names(tmp_path) == ["best", "step-000010", "step-000030", "step-000040"]
    policy = Weights()
    point = Checkpoints(config, tmp_path, Ranks()).load_newest(policy)
    assert point is not None
    assert (point.version, point.sequence, point.num_visits) == (Version(0, 40), 40, 400)
    assert float(policy.values["value.0"][0]) == 40


@pytest.mark.usefixtures("config")
def test_those_of_every_so_many_steps_are_kept_too(tmp_path: Path) -> None:
    saved(Checkpoints(make_config(tmp_path, keep_checkpoints=1, keep_every=20), tmp_path, Ranks()), 10, 20, 30, 40, 50)
    assert names(tmp_path) == ["step-000020", "step-000040", "step-000050"]


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


def test_an_evaluation_that_is_in_before_its_checkpoint_is_whole_counts(config: Config, tmp_path: Path) -> None:
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    checkpoints.save(Weights(), Version(0, 1), commit(1))
    checkpoints.mark_best(Version(0, 1), 0.7)
    assert not (tmp_path / "checkpoints" / "best").exists()
    checkpoints.finish()
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-000001"


def test_a_best_that_cannot_be_marked_is_one_line(config: Config, tmp_path: Path) -> None:
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    saved(checkpoints, 1)
    best = tmp_path / "checkpoints" / "best"
    best.mkdir()
    with pytest.raises(RunDirectoryError, match=r"checkpoints/best: cannot be written: Is a directory"):
        checkpoints.mark_best(Version(0, 1), 0.7)
    (best / "accuracy.json").write_text("high")
    with pytest.raises(RunDirectoryError, match=r"best/accuracy.json: found no accuracy in it: .*malformed") as caught:
        checkpoints.mark_best(Version(0, 1), 0.7)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("config")
def test_a_checkpoint_is_on_the_disk_before_another_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(make_config(tmp_path, keep_checkpoints=1), tmp_path, Ranks())
    saved(checkpoints, 1)
    fsync, synced = os.fsync, list[tuple[str, list[str]]]()

    def noted(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            synced.append((path.name, sorted(os.listdir(descriptor))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    saved(checkpoints, 2)
    assert synced == [
        ("megatron", [".metadata", "__0_0.distcp"]),
        (".step-000002.partial", ["megatron", "version.json"]),
        ("checkpoints", ["step-000001", "step-000002"]),
    ]
    assert names(tmp_path) == ["step-000002"]


def test_a_process_that_is_killed_while_it_forgets_leaves_nothing_that_looks_whole(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(path: Path, **_: bool) -> None:
        for file in path.glob("megatron/*.distcp"):
            file.unlink()
            raise KilledError

    checkpoints = Checkpoints(config, tmp_path, Ranks())
    saved(checkpoints, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            saved(checkpoints, 3)
    assert names(tmp_path) == [".step-000001.partial", "step-000002", "step-000003"]
    Checkpoints(config, tmp_path, Ranks()).load_newest(Weights())
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_what_is_trained_during_a_save_is_not_in_it(config: Config, tmp_path: Path) -> None:
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    policy = Weights(1, num_tensors=20)
    checkpoints.save(policy, Version(0, 1), commit(1))
    for tensor in policy.values.values():
        tensor.add_(1)
    while (found := checkpoints.look()) is None:
        assert names(tmp_path) == [".step-000001.partial"], "nothing has the name of a checkpoint before it is whole"
        time.sleep(0.001)
    assert found.write_s > 0
    assert checkpoints.look() is None
    assert checkpoints.finish() is None
    Checkpoints(config, tmp_path, Ranks()).load_newest(policy)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in policy.values.values())


def test_a_full_disk_leaves_what_was_there_before(config: Config, tmp_path: Path) -> None:
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    saved(checkpoints, 1)
    with limited_files(100_000):
        checkpoints.save(Weights(2), Version(0, 2), commit(2))
        with pytest.raises(RunDirectoryError, match=r"step-000002.partial/megatron: cannot be written: ") as caught:
            checkpoints.finish()
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-000001"]
    saved(checkpoints, 3)
    assert names(tmp_path) == ["step-000001", "step-000003"]


@pytest.mark.usefixtures("config")
def test_a_wait_for_a_save_has_a_deadline_and_says_what_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(saving, "write", lambda *_: go_on.wait())
    checkpoints = Checkpoints(make_config(tmp_path, stall_timeout_s=1e-6), tmp_path, Ranks())
    checkpoints.save(Weights(), Version(0, 1), commit(1))
    with pytest.raises(StallError, match=r"waited run.stall_timeout_s for rank 0 to write .*step-000001"):
        checkpoints.finish()
    go_on.set()


def test_a_process_that_is_killed_during_a_save_leaves_the_last_whole_checkpoint(
    config: Config, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.learner.test_checkpoints", str(tmp_path)]
    ended = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -signal.SIGXFSZ
    (file,) = (tmp_path / "checkpoints" / ".step-000002.partial").glob("megatron/*.distcp")
    assert file.stat().st_size == KILLED_AT_BYTES
    assert names(tmp_path) == [".step-000002.partial", "step-000001"]
    policy = Weights()
    point = Checkpoints(config, tmp_path, Ranks()).load_newest(policy)
    assert point is not None
    assert point.version == Version(0, 1)
    assert float(policy.values["value.0"][0]) == 1
    assert names(tmp_path) == ["step-000001"]


def test_a_checkpoint_of_another_run_is_refused(config: Config, tmp_path: Path) -> None:
    saved(Checkpoints(config, tmp_path, Ranks()), 1)
    path = tmp_path / "checkpoints" / "step-000001"
    msgspec.structs.replace(SavePoint.read(path), run="another-run").write(path)
    with pytest.raises(RunDirectoryError, match=r"version.json: found a checkpoint of run another-, expected one of"):
        Checkpoints(config, tmp_path, Ranks()).load_newest(Weights())


def test_the_hugging_face_form_is_added_to_a_checkpoint_that_is_there(config: Config, tmp_path: Path) -> None:
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    assert checkpoints.write_hugging_face(Weights(), 1) is None
    saved(checkpoints, 1)
    path = checkpoints.write_hugging_face(Weights(), 1)
    assert path == tmp_path / "checkpoints" / "step-000001" / "huggingface"
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]


@contextmanager
def limited_files(size_bytes: int) -> Iterator[None]:
    """No file may become larger: as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _save_and_be_killed(run_dir: Path) -> None:
    """Saves twice; the kernel kills it when a file of the second save comes to `KILLED_AT_BYTES`."""
    checkpoints = Checkpoints(make_config(run_dir), run_dir, Ranks())
    saved(checkpoints, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
    with limited_files(KILLED_AT_BYTES):
        checkpoints.save(Weights(2, num_tensors=8), Version(0, 2), commit(2))
        checkpoints.finish()


if __name__ == "__main__":
    _save_and_be_killed(Path(sys.argv[1]))
