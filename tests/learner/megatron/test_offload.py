"""Moments on the host change where they are, and no bit of what is learned."""

from pathlib import Path
from typing import Any

import pytest
import torch

from learner.megatron.offload import HostAdam
from learner.megatron.policy import Policy
from learner.sharded import write
from tests.learner.megatron import tiny

LENGTHS = [5, 9, 9, 12, 2, 30]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offloaded_optimizer_learns_bit_for_bit_the_same(dtype: str, tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3-moe", dtype=getattr(torch, dtype))
    policies = [_policy(tmp_path, dtype, offload=offload) for offload in (True, False)]
    assert [isinstance(_adam(policy), HostAdam) for policy in policies] == [True, False]
    for policy in policies:
        _train(policy, 3)
    for (name, there), (_, here) in zip(*(policy.export() for policy in policies), strict=True):
        assert torch.equal(there, here), name


def test_an_offloaded_optimizer_goes_on_from_a_checkpoint_of_either_kind(tmp_path: Path) -> None:
    tiny.build(tmp_path / "model", "qwen3-moe")
    there, here = (_policy(tmp_path / "model", "float32", offload=offload) for offload in (True, False))
    for policy, name in ((there, "there"), (here, "here")):
        _train(policy, 2)
        write(tmp_path / name, policy.snapshot(), None)
    resumed = [_policy(tmp_path / "model", "float32", offload=True) for _ in range(2)]
    for policy, name in zip(resumed, ("there", "here"), strict=True):
        policy.load(tmp_path / name)
    for policy in (there, *resumed):
        _train(policy, 2)
    assert float(next(iter(_adam(resumed[0]).state.values()))["exp_avg"].abs().sum()) > 0
    for tensors in zip(there.export(), *(policy.export() for policy in resumed), strict=True):
        assert all(torch.equal(tensor, tensors[0][1]) for _, tensor in tensors), tensors[0][0]


def _policy(path: Path, dtype: str, *, offload: bool) -> Policy:
    return Policy(tiny.config(path, learner={"dtype": dtype, "offload_optimizer": offload}))


def _train(policy: Policy, num_updates: int) -> None:
    for seed in range(num_updates):
        policy.update(tiny.micro_batches(LENGTHS, seed=seed, max_tokens=40), tiny.masked_mean_loss)


def _adam(policy: Policy) -> Any:
    return policy._optimizer.megatron.chained_optimizers[0].optimizer
