"""Weights: Hugging Face to Megatron and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config import Config
from common.errors import ModelError
from learner.export import write_hugging_face
from learner.megatron.policy import Policy
from learner.ranks import Ranks
from tests.learner.megatron import tiny


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_is_exported_is_what_was_imported_bit_for_bit(kind: str, dtype: str, tmp_path: Path) -> None:
    tiny.build(tmp_path, kind, dtype=getattr(torch, dtype))
    policy = Policy(tiny.config(tmp_path, learner={"dtype": dtype}))
    exported = dict(policy.export())
    original = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == original.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == original[name].dtype
        assert torch.equal(tensor, original[name]), name
    assert policy.vocab_size == tiny.VOCAB


@pytest.mark.parametrize("kind", ["qwen2", "qwen3-tied", "qwen3-moe"])
def test_an_exported_policy_is_the_same_policy(kind: str, tmp_path: Path) -> None:
    tiny.build(tmp_path / "a", kind)
    policy = Policy(tiny.config(tmp_path / "a"))
    micros = tiny.micro_batches([9, 9, 12])
    policy.update(micros, tiny.masked_mean_loss)
    write_hugging_face(policy.export(), tmp_path / "a", tmp_path / "b", Ranks())
    logprobs = policy.logprobs(micros[:1])[0]
    assert torch.equal(Policy(tiny.config(tmp_path / "b")).logprobs(micros[:1])[0], logprobs)
    reference = tiny.reference_class(kind).from_pretrained(tmp_path / "b")
    with torch.no_grad():
        expected = tiny.reference_logprobs(reference, micros[0], 0.8)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)


def test_a_model_in_shards_is_read_like_one_file(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3")
    original = load_file(tmp_path / "model.safetensors")
    _shard(tmp_path, original)
    exported = dict(Policy(tiny.config(tmp_path)).export())
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


def test_a_rotary_base_beside_the_other_keys_is_read_too(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen2")
    micro = tiny.micro_batches([30])[0]
    expected = Policy(tiny.config(tmp_path)).logprobs([micro])[0]
    _edit(tmp_path, rope_parameters=None, rope_theta=50_000)
    assert torch.equal(Policy(tiny.config(tmp_path)).logprobs([micro])[0], expected)
    _edit(tmp_path, rope_theta=10_000)
    assert not torch.equal(Policy(tiny.config(tmp_path)).logprobs([micro])[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "found architecture LlamaForCausalLM, expected one of Qwen2"),
        ({"architectures": []}, "found architecture none, expected one of Qwen2ForCausalLM"),
        ({"architectures": None}, "found architecture none"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "expected all of them positive"),
        ({"num_key_value_heads": 3}, "found 4, expected a multiple of num_key_value_heads = 3"),
        ({"hidden_act": "gelu"}, "found 'gelu', expected 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window: found true"),
        ({"attention_bias": True}, "attention_bias: found true"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "found rope_type 'yarn', expected 'default'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "found rope_type 'linear'"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: found 9, expected 1 to num_experts = 4"),
        ({"mlp_only_layers": [1]}, "expected experts in every layer"),
        ({"vocab_size": 60}, "model.embed_tokens.weight: found shape [61, 32], expected [60, 32]"),
        ({"num_hidden_layers": 3}, "found no tensor model.layers.2.input_layernorm.weight"),
    ],
)
def test_a_config_that_is_not_supported_is_one_line(change: dict[str, object], message: str, tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3-moe")
    _edit(tmp_path, **change)
    assert message in _error(tiny.config(tmp_path))


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'}: not found, expected" in _error(tiny.config(tmp_path / "none"))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read"), ("[]", "found list, expected an object"), ("\xff", "cannot be read")]
)
def test_a_broken_config_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert f"{tmp_path / 'config.json'}: {message}" in _error(tiny.config(tmp_path))


def test_a_directory_without_config_or_weights_is_one_line(tmp_path: Path) -> None:
    assert "config.json: not found, expected the model's configuration" in _error(tiny.config(tmp_path))
    tiny.build(tmp_path, "qwen2")
    (tmp_path / "model.safetensors").unlink()
    assert "found no weights, expected model.safetensors or" in _error(tiny.config(tmp_path))


def test_broken_weights_are_one_line(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen2")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    assert "model.safetensors: found no valid safetensors file" in _error(tiny.config(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "index.json: found no valid index" in _error(tiny.config(tmp_path))


def test_a_missing_shard_is_one_line(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen2")
    _shard(tmp_path, load_file(tmp_path / "model.safetensors"))
    (tmp_path / "part-2.safetensors").unlink()
    assert "part-2.safetensors: found no valid safetensors file" in _error(tiny.config(tmp_path))


def _error(config: Config) -> str:
    with pytest.raises(ModelError) as caught:
        Policy(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _edit(path: Path, **changes: object) -> None:
    """Changes keys of the config; None removes one."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def _shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = sorted(tensors)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()
