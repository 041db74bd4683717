"""How many parameters a model, a learner rank and an engine's GPU have, from the model's sizes."""

from typing import NamedTuple

from common.learning import ParallelConfig
from common.sections import EngineParallelConfig
from common.shape import ModelShape


class Parameters(NamedTuple):
    """Of one rank; the two kinds have replicas of different number.

    Attributes:
        dense: All but the experts.
        experts: Of the experts.
    """

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.experts


def model_parameters(shape: ModelShape) -> int:
    """Of the whole model; a tied output layer is the embedding."""
    return rank_parameters(shape, ParallelConfig(), 0).total


def rank_parameters(shape: ModelShape, parallel: ParallelConfig, stage: int) -> Parameters:
    """Of a learner rank in a pipeline stage: all ranks of a stage have as many.

    The first stage has the embedding, the last the final norm and the output layer; a tied one is a copy where it is
    not the embedding's own rank.
    """
    layers = shape.num_hidden_layers // parallel.pipeline
    first, last = stage == 0, stage == parallel.pipeline - 1
    vocabulary = shape.vocab_size * shape.hidden_size // parallel.tensor
    dense = layers * _dense_layer(shape, parallel.tensor)
    dense += vocabulary if first else 0
    dense += shape.hidden_size if last else 0
    dense += vocabulary if last and not (first and shape.tie_word_embeddings) else 0
    experts = layers * _experts(shape) // (parallel.expert * parallel.expert_tensor)
    return Parameters(dense, experts)


def engine_parameters(shape: ModelShape, parallel: EngineParallelConfig) -> int:
    """Of one GPU of an engine: copies of attention have the embedding too, the output layer is shared by all GPUs.

    Source: sglang 0.5.21, models/qwen2_moe.py and qwen3_moe.py.
    """
    vocabulary = shape.vocab_size * shape.hidden_size
    head = vocabulary // (parallel.tensor if shape.tie_word_embeddings else parallel.num_gpus)
    embedding = 0 if shape.tie_word_embeddings else vocabulary // parallel.tensor
    dense = shape.num_hidden_layers * _dense_layer(shape, parallel.tensor) + shape.hidden_size
    return dense + embedding + head + shape.num_hidden_layers * _experts(shape) // parallel.num_gpus


def _dense_layer(shape: ModelShape, tensor: int) -> int:
    """Of one layer without its experts. Norms, the router, and key and value heads fewer than ranks are copied."""
    hidden = shape.hidden_size
    queries = shape.num_attention_heads // tensor * shape.channels
    keys = max(1, shape.num_key_value_heads // tensor) * shape.channels
    projected = queries + 2 * keys
    attention = hidden * projected + queries * hidden
    attention += projected if shape.has_qkv_bias else 0
    attention += 2 * shape.channels if shape.has_qk_norm else 0
    router_or_mlp = hidden * shape.total_experts if shape.is_moe else 3 * hidden * shape.intermediate_size // tensor
    return attention + router_or_mlp + 2 * hidden


def _experts(shape: ModelShape) -> int:
    """Of all experts of one layer."""
    return shape.total_experts * 3 * shape.hidden_size * shape.moe_intermediate_size if shape.is_moe else 0
