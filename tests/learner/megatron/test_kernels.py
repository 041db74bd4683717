"""Which kernels the model is made of, given what is installed; TransformerEngine itself is not run here."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from common.errors import ConfigError
from common.learning import LearnerConfig
from common.shape import read_shape
from learner.megatron.attention import PackedAttention, RMSNorm, packed_runs
from learner.megatron.experts import GroupedExperts
from learner.megatron.kernels import Installed, Kernels, choose, core_attention, installed
from learner.megatron.model import layer_spec, transformer_config
from learner.megatron.policy import Policy
from learner.megatron.substitutes import has_engine
from tests.learner.megatron import tiny

NOTHING = Installed(
    cuda=False, transformer_engine=False, apex_gradients=False, triton=False, adam="learner", router_product=False
)
GPU = NOTHING._replace(cuda=True, triton=True)
ENGINE = GPU._replace(transformer_engine=True, apex_gradients=True, adam="transformer_engine", router_product=True)
OLD_ENGINE = GPU._replace(adam="transformer_engine")
OURS = Kernels("torch SDPA", *["torch"] * 7)
THEIRS = Kernels(*["TransformerEngine"] * 4, "torch compiled", "Apex", *["TransformerEngine"] * 2)
_DETERMINISM = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"


@pytest.mark.parametrize(
    ("there", "dtype", "expected"),
    [
        (NOTHING, torch.bfloat16, OURS),
        (NOTHING._replace(transformer_engine=True, apex_gradients=True), torch.bfloat16, OURS),
        (GPU, torch.bfloat16, OURS._replace(swiglu="torch compiled")),
        (GPU._replace(triton=False), torch.bfloat16, OURS),
        (GPU._replace(adam="apex"), torch.bfloat16, OURS._replace(swiglu="torch compiled", adam="Apex")),
        (ENGINE, torch.bfloat16, THEIRS),
        (ENGINE, torch.float32, THEIRS._replace(core_attention="torch SDPA")),
        (OLD_ENGINE, torch.bfloat16, OURS._replace(swiglu="torch compiled", adam="TransformerEngine")),
    ],
)
def test_kernels_are_what_is_installed(there: Installed, dtype: torch.dtype, expected: Kernels) -> None:
    assert choose(there, dtype, adam_on_host=False) == expected
    assert choose(there, dtype, adam_on_host=True) == expected._replace(adam="torch")


@pytest.mark.parametrize(
    ("version", "enough"), [("1.13.0", False), ("2.0", False), ("2.1.0", True), ("2.8.0+cu13", True)]
)
def test_an_engine_that_is_too_old_counts_as_none(
    version: str, enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_engine()
    described = tmp_path / f"transformer_engine-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert has_engine() is enough


def test_without_a_gpu_all_kernels_are_torchs() -> None:
    assert choose(installed(), torch.bfloat16, adam_on_host=False) == OURS


def test_an_environment_that_asks_for_passes_that_differ_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_DETERMINISM, "1")
    assert core_attention(OURS) is PackedAttention
    with pytest.raises(ConfigError, match=f"found {_DETERMINISM}=1, expected 0"):
        core_attention(THEIRS)


def test_only_what_was_chosen_changes_in_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    monkeypatch.setenv(_DETERMINISM, "")
    monkeypatch.delenv(_DETERMINISM)
    shape = read_shape(tiny.build(tmp_path, "qwen3-moe"))
    here, there = (
        choose(kind, torch.bfloat16, adam_on_host=False)._replace(norm="torch") for kind in (NOTHING, ENGINE)
    )
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
        config: Any = transformer_config(
            shape, learner, torch.bfloat16, choose(there, torch.bfloat16, adam_on_host=False)
        )
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
