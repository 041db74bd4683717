"""The sizes of the built-in model, under the names of its config.json: known before it is built, and without torch."""

from typing import Any

import msgspec

from common.architectures import QWEN3, QWEN3_MOE
from common.shape import ModelShape

_DENSE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": False,
}


def tiny_sizes(num_experts: int) -> dict[str, Any]:
    """Of a Qwen3, or of a Qwen3-MoE with so many experts a layer."""
    if not num_experts:
        return _DENSE
    experts = {"num_experts": num_experts, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    return _DENSE | experts | {"norm_topk_prob": True}


def tiny_shape(num_experts: int) -> ModelShape:
    """What `read_shape` will say of the model."""
    architecture = QWEN3_MOE if num_experts else QWEN3
    return msgspec.convert({"architectures": [architecture], **tiny_sizes(num_experts)}, ModelShape)
