"""Which kernels the model is made of, given what is installed; TransformerEngine itself is not run here."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from common.learning import LearnerConfig
from common.shape import read_shape
from learner.megatron.attention import PackedAttention, RMSNorm, packed_runs
from learner.megatron.experts import GroupedExperts
from learner.megatron.kernels import Installed, choose, installed
from learner.megatron.model import layer_spec, transformer_config
from learner.megatron.policy import Policy
from tests.learner.megatron import tiny

NOTHING = Installed(cuda=False, transformer_engine=None, apex_gradients=False, triton=False)
GPU = NOTHING._replace(cuda=True, triton=True)
ENGINE = GPU._replace(transformer_engine=(2, 8), apex_gradients=True)
OURS = ("torch SDPA", "torch", "torch", "torch", "torch", "torch")
_DETERMINISM = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
THEIRS = ("TransformerEngine",) * 4


@pytest.mark.parametrize(
    ("there", "dtype", "expected"),
    [
        (NOTHING, torch.bfloat16, OURS),
        (ENGINE._replace(cuda=False), torch.bfloat16, OURS),
        (GPU, torch.bfloat16, (*OURS[:4], "torch compiled", "torch")),
        (GPU._replace(triton=False), torch.bfloat16, OURS),
        (ENGINE, torch.bfloat16, (*THEIRS, "torch compiled", "Apex")),
        (ENGINE, torch.float32, ("torch SDPA", *THEIRS[1:], "torch compiled", "Apex")),
        (ENGINE._replace(transformer_engine=(1, 13)), torch.bfloat16, (*THEIRS[:3], "torch", "torch compiled", "Apex")),
    ],
)
def test_kernels_are_what_is_installed(there: Installed, dtype: torch.dtype, expected: tuple[str, ...]) -> None:
    assert choose(there, dtype) == (*expected, "torch grouped_mm")


def test_without_a_gpu_all_kernels_are_torchs() -> None:
    assert choose(installed(), torch.bfloat16) == (*OURS, "torch grouped_mm")


def test_only_what_was_chosen_changes_in_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    monkeypatch.setenv(_DETERMINISM, "")
    monkeypatch.delenv(_DETERMINISM)
    shape = read_shape(tiny.build(tmp_path, "qwen3-moe"))
    here, there = (choose(kind, torch.bfloat16)._replace(norm="torch") for kind in (NOTHING, ENGINE))
    ours, theirs = (layer_spec(shape, chosen).submodules for chosen in (here, there))
    core = (ours.self_attention.submodules.core_attention, theirs.self_attention.submodules.core_attention)
    assert core == (PackedAttention, TEDotProductAttention)
    assert os.environ[_DETERMINISM] == "0"  # else Megatron refuses its deterministic mode
    theirs.self_attention.submodules.core_attention = core[0]
    assert ours == theirs
    assert ours.input_layernorm is RMSNorm
    assert ours.mlp.submodules.experts is GroupedExperts


def test_an_installed_engine_is_asked_for_its_fused_kernels(tmp_path: Path) -> None:
    shape = read_shape(tiny.build(tmp_path, "qwen3"))
    Policy(tiny.config(tmp_path))  # puts the substitute of the rotary kernel in place
    learner = msgspec.convert({}, LearnerConfig)
    names = ("bias_activation_fusion", "gradient_accumulation_fusion", "moe_permute_fusion", "apply_rope_fusion")
    for there, expected in ((NOTHING, (False, False, False, True)), (GPU, (True, False, False, True))):
        config: Any = transformer_config(shape, learner, torch.bfloat16, choose(there, torch.bfloat16))
        assert tuple(getattr(config, name) for name in names) == expected


def test_the_compiled_activation_is_the_same_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    policy: Any = Policy(tiny.config(tiny.build(tmp_path, "qwen3-moe")))
    experts: GroupedExperts = policy._pieces[0].decoder.layers[0].mlp.experts
    hidden, probs = torch.randn(12, 32, requires_grad=True), torch.rand(12, requires_grad=True)
    inputs, rows = [hidden, probs, experts.gate_up, experts.down], torch.tensor([0, 7, 0, 5])
    found: list[tuple[torch.Tensor, ...]] = []
    for fused in (False, True):
        monkeypatch.setattr(experts.config, "bias_activation_fusion", fused)
        output, _ = experts(hidden, rows, probs)
        found.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled)


def test_ranks_that_share_sequences_are_told_padded_starts() -> None:
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    alone, shared = (packed_runs(starts, torch.device("cpu"), ranks) for ranks in (1, 2))
    assert alone.cu_seqlens_q_padded is None
    assert shared.cu_seqlens_q_padded is shared.cu_seqlens_q
    assert shared.cu_seqlens_kv_padded is shared.cu_seqlens_kv
