"""How many parameters of a model one learner rank holds."""

from common.sections import ParallelConfig
from common.shape import ModelShape

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


def rank_parameters(shape: ModelShape, parallel: ParallelConfig) -> int:
    """Parameters of the rank that holds most of them. The model must be divisible (`common.shape.check_division`)."""
    embedding = shape.vocab_size * shape.hidden_size // parallel.tensor
    layers = shape.num_hidden_layers // parallel.pipeline * _layer(shape, parallel)
    if parallel.pipeline > 1:  # embedding and output layer are on different stages, each with a copy where tied
        return layers + embedding + shape.hidden_size
    return layers + embedding * (1 if shape.tie_word_embeddings else 2) + shape.hidden_size


def _layer(shape: ModelShape, parallel: ParallelConfig) -> int:
    """Norms and the router are whole on each rank."""
    hidden, channels = shape.hidden_size, shape.channels
    heads = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * channels
    attention = hidden * (heads + shape.num_attention_heads * channels) + (heads if shape.has_qkv_bias else 0)
    norms = 2 * hidden + (2 * channels if shape.has_qk_norm else 0)
    if not shape.is_moe:
        return norms + (attention + 3 * hidden * shape.intermediate_size) // parallel.tensor
    experts = 3 * hidden * shape.moe_intermediate_size * shape.total_experts
    router = hidden * shape.total_experts
    return norms + router + attention // parallel.tensor + experts // (parallel.expert * parallel.expert_tensor)
