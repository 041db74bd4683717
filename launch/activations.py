"""What a learner rank holds between forward and backward pass: bytes, counted tensor by tensor.

Megatron-core's local layers with `learner.megatron.attention` keep for each packed token, in `item` bytes a value
unless said otherwise (`tests/launch/test_launch_memory.py` compares with what is kept):

    norm              its input, its output for what follows, the scale in float32
    attention         queries, keys and values as projected; queries, keys, result of the attention, the same in order;
                      with norms of queries and keys, those of each head
    feed-forward      gate and up, the activation, up again, their product: five widths
    experts           for each of a token's experts its input and three widths; the router's choice

What this does not know: fused kernels, which keep less, and experts that get more tokens than others.
"""

from typing import NamedTuple

from common.config import Config
from common.learning import ParallelConfig
from common.shape import ModelShape

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_WIDE = 4


class LayerBytes(NamedTuple):
    """Of one token in one layer, on one rank.

    Attributes:
        input: The layer's own input.
        attention: What attention and both norms keep.
        feed_forward: What the feed-forward part or the experts keep.
        working: The most that is alive beside what is kept while one layer is at work.
    """

    input: float
    attention: float
    feed_forward: float
    working: float


def layer_bytes(shape: ModelShape, parallel: ParallelConfig, item: int) -> LayerBytes:
    """Of one token in one layer; with sequence parallelism a rank has its share of the tokens outside the matrices."""
    share = parallel.tensor if parallel.sequence else 1
    hidden = shape.hidden_size
    attention = 2 * _norm(hidden, item) / share + 2 * item * hidden / share + _attention(shape, parallel.tensor, item)
    if not shape.is_moe:
        width = shape.intermediate_size / parallel.tensor
        return LayerBytes(item * hidden / share, attention, 5 * item * width, 3 * (_WIDE + item) * hidden / share)
    rows = shape.num_experts_per_tok * parallel.expert_tensor
    width = shape.moe_intermediate_size / parallel.expert_tensor
    experts = rows * (item * (hidden + 3 * width) + _WIDE)
    choice = 5 * shape.total_experts + 20 * shape.num_experts_per_tok
    copies = 3 if parallel.expert * parallel.expert_tensor == 1 else 4  # one more on the way to other ranks and back
    return LayerBytes(
        item * hidden / share, attention, (experts + choice) / share, copies * rows * item * hidden / share
    )


class HeldBytes(NamedTuple):
    """Of a rank, for the largest micro-batches.

    Attributes:
        activations: What is kept from forward to backward passes.
        layer: What one layer's backward pass needs beside that: what it computes anew, and its gradients.
    """

    activations: int
    layer: int


def held_bytes(config: Config, shape: ModelShape, stage: int) -> HeldBytes:
    """Of a rank of a pipeline stage."""
    learner, parallel = config.learner, config.learner.parallel
    item = ITEM_BYTES[learner.dtype]
    layer = layer_bytes(shape, parallel, item)
    kept, anew = {
        "none": (layer.attention + layer.feed_forward, 0.0),
        "selective": (layer.attention, layer.feed_forward),
        "full": (layer.input, layer.attention + layer.feed_forward),
    }[learner.recompute]
    num_layers = shape.num_hidden_layers // (parallel.pipeline * parallel.virtual_pipeline)
    rotary = item * shape.channels  # cosines and sines of a micro-batch
    whole = _pieces_in_flight(parallel, stage) * (num_layers * kept + rotary)
    if stage == parallel.pipeline - 1:
        whole += _final(shape, parallel, item)
    tokens = learner.max_tokens_per_microbatch / parallel.context
    return HeldBytes(int(whole * tokens), int((anew + layer.working) * tokens))


def _norm(width: float, item: int) -> float:
    return item * width + _WIDE


def _attention(shape: ModelShape, tensor: int, item: int) -> float:
    heads, groups = shape.num_attention_heads / tensor, shape.num_key_value_heads / tensor
    queries, keys = heads * shape.channels, groups * shape.channels
    projected = item * (queries + 2 * keys)
    core = item * (2 * queries + keys) + _WIDE * heads
    normed = item * queries + _WIDE * (heads + groups) if shape.has_qk_norm else 0.0  # keys are the projected ones
    return projected + core + item * queries + normed


def _final(shape: ModelShape, parallel: ParallelConfig, item: int) -> float:
    """The final norm and, for the logprobs, the hidden states and their gradient, of all tokens."""
    share = parallel.tensor if parallel.sequence else 1
    return _norm(shape.hidden_size, item) / share + 2 * item * shape.hidden_size


def _pieces_in_flight(parallel: ParallelConfig, stage: int) -> int:
    """Forward passes of a stage's piece of layers that wait for their backward pass: 1F1B, interleaved with pieces."""
    before = parallel.pipeline - stage - 1
    if parallel.virtual_pipeline == 1:
        return before + 1
    return 2 * before + (parallel.virtual_pipeline - 1) * parallel.pipeline + 1
