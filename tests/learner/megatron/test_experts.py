"""The stacked experts against one expert after the other, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from learner.megatron.experts import GroupedExperts
from learner.megatron.policy import Policy
from tests.learner.megatron import tiny

ROWS_OF_EXPERTS = {"even": [3, 3, 3, 3], "some without rows": [0, 7, 0, 5], "no rows": [0, 0, 0, 0]}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> GroupedExperts:
    policy: Any = Policy(tiny.config(tiny.build(tmp_path_factory.mktemp("model"), "qwen3-moe")))
    return policy._pieces[0].decoder.layers[0].mlp.experts


@pytest.mark.parametrize("rows", ROWS_OF_EXPERTS.values(), ids=ROWS_OF_EXPERTS.keys())
def test_the_experts_are_those_of_a_loop(rows: list[int], experts: GroupedExperts) -> None:
    torch.manual_seed(0)
    hidden, probs = torch.randn(sum(rows), 32, requires_grad=True), torch.rand(sum(rows), requires_grad=True)
    grad = torch.randn(sum(rows), 32)
    inputs = [hidden, probs, experts.gate_up, experts.down]
    output, _ = experts(hidden, torch.tensor(rows), probs)
    gradients = torch.autograd.grad(output, inputs, grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = _one_by_one(*wide, rows)
    for found, wanted in zip(
        [output, *gradients], [expected, *torch.autograd.grad(expected, wide, grad.double())], strict=True
    ):
        assert float((found - wanted).detach().norm()) <= 1e-6 * float(wanted.detach().norm())


def test_shares_stay_in_float32_beside_weights_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tiny.build(tmp_path, "qwen3-moe", dtype=torch.bfloat16)
    policy: Any = Policy(tiny.config(path, learner={"dtype": "bfloat16"}))
    own: GroupedExperts = policy._pieces[0].decoder.layers[0].mlp.experts
    hidden, probs = torch.randn(12, 32, dtype=torch.bfloat16), torch.rand(12, requires_grad=True)
    output, _ = own(hidden, torch.tensor([3, 3, 3, 3]), probs)
    output.backward(torch.ones_like(output))
    wide = [tensor.detach().double() for tensor in (hidden, probs, own.gate_up, own.down)]
    assert output.dtype is torch.bfloat16
    assert probs.grad is not None
    assert probs.grad.dtype is torch.float32
    torch.testing.assert_close(output.double(), _one_by_one(*wide, [3, 3, 3, 3]), rtol=0.03, atol=0.03)


def _one_by_one(hidden: Tensor, probs: Tensor, gate_up: Tensor, down: Tensor, rows: list[int]) -> Tensor:
    outputs: list[Tensor] = []
    for own, part, both, last in zip(hidden.split(rows), probs.split(rows), gate_up, down, strict=True):
        gate, up = (own @ projection.t() for projection in both)
        outputs.append((F.silu(gate) * up * part[:, None]) @ last.t())
    return torch.cat(outputs)
