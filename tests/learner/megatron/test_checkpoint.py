"""Checkpoints: what is loaded goes on as if nothing had happened."""

import resource
from pathlib import Path

import pytest
import torch

from common.errors import RunDirectoryError
from learner.megatron.policy import Policy
from learner.sharded import write
from tests.learner.megatron import tiny


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("qwen2", "float32"), ("qwen3-tied", "float32"), ("qwen3-moe", "float32"), ("qwen3-moe", "bfloat16")],
)
def test_a_loaded_policy_continues_bit_for_bit(kind: str, dtype: str, tmp_path: Path) -> None:
    tiny.build(tmp_path / "model", kind)
    changes = {"optimizer": {"lr": 1e-2, "warmup_steps": 2}, "learner": {"dtype": dtype}}
    config = tiny.config(tmp_path / "model", **changes)
    whole = Policy(config)
    _update(whole, 1)
    _update(whole, 2)
    state, noise = whole.snapshot(), torch.rand(3)
    rate = _update(whole, 3)
    write(tmp_path / "saved", state, None)  # a snapshot does not see what is trained after it

    resumed = Policy(config)
    _update(resumed, 9)
    resumed.load(tmp_path / "saved")
    assert torch.equal(torch.rand(3), noise)
    assert _update(resumed, 3) == rate
    exported = dict(whole.export())
    for name, tensor in resumed.export():
        assert torch.equal(tensor, exported[name]), name


def test_a_checkpoint_of_untrained_weights_can_be_loaded(tmp_path: Path) -> None:
    tiny.build(tmp_path / "model", "qwen3")
    config = tiny.config(tmp_path / "model")
    policy = Policy(config)
    write(tmp_path / "saved", policy.snapshot(), None)
    _update(policy, 1)
    resumed = Policy(config)
    resumed.load(tmp_path / "saved")
    _update(resumed, 1)
    exported = dict(policy.export())
    assert all(torch.equal(tensor, exported[name]) for name, tensor in resumed.export())


def test_a_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    policy = Policy(tiny.config(tiny.build(tmp_path / "model", "qwen3")))
    with pytest.raises(RunDirectoryError, match="none: cannot be read"):
        policy.load(tmp_path / "none")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    policy = Policy(tiny.config(tiny.build(tmp_path / "model", "qwen3")))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        write(tmp_path / "file" / "saved", policy.snapshot(), None)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    policy = Policy(tiny.config(tiny.build(tmp_path / "model", "qwen3")))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RunDirectoryError, match="saved: cannot be written") as caught:
            write(tmp_path / "saved", policy.snapshot(), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "saved", Policy(tiny.config(tiny.build(tmp_path / "a", "qwen3"))).snapshot(), None)
    other = Policy(tiny.config(tiny.build(tmp_path / "b", "qwen3", hidden_size=64)))
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        other.load(tmp_path / "saved")


def _update(policy: Policy, seed: int) -> float:
    return policy.update(tiny.micro_batches([9, 9, 12, 5], seed=seed, max_tokens=24), tiny.masked_mean_loss).lr
