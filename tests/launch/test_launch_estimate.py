"""The estimate's arithmetic, beside numbers worked out by hand."""

from typing import Any

import msgspec
import pytest

from common.architectures import QWEN2, QWEN3_MOE
from common.config import Config
from common.learning import ParallelConfig
from common.sections import EngineParallelConfig
from common.shape import ModelShape
from launch.activations import held_bytes, layer_bytes
from launch.estimate import (
    assumed_delta,
    checkpoint_bytes,
    engine_memory,
    host_memory,
    logits_bytes,
    pulled_copies,
    rank_memory,
    update_bytes,
)
from launch.parameters import Parameters, engine_parameters, model_parameters, rank_parameters
from launch.placement import place

DENSE = ModelShape(
    architectures=(QWEN2,),
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    tie_word_embeddings=True,
)
MOE = ModelShape(
    architectures=(QWEN3_MOE,),
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=96,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)
# attention, biases, feed-forward, norms: queries 64 wide, keys and values 32 each
DENSE_LAYER = 64 * 128 + 64 * 64 + 128 + 3 * 64 * 96 + 2 * 64
# attention, norms of heads, router, norms: queries 128 wide, keys and values 64 each
MOE_LAYER = 64 * 256 + 128 * 64 + 2 * 32 + 64 * 8 + 2 * 64
EXPERTS = 8 * 3 * 64 * 16


def config(**sections: Any) -> Config:
    return msgspec.convert(sections, Config)


def learner(**parallel: Any) -> dict[str, Any]:
    return {"dtype": "bfloat16", "max_tokens_per_microbatch": 4096, "parallel": parallel}


def test_parameters_of_a_model() -> None:
    assert model_parameters(DENSE) == 64_000 + 4 * DENSE_LAYER + 64
    assert model_parameters(MOE) == 2 * 64_000 + 4 * (MOE_LAYER + EXPERTS) + 64


def test_tensor_ranks_share_matrices_and_copy_norms_and_the_router() -> None:
    parallel = ParallelConfig(tensor=2, data=4, sequence=True, expert=8)
    layer = 64 * 128 + 64 * 64 + 2 * 32 + 64 * 8 + 2 * 64
    assert rank_parameters(MOE, parallel, 0) == Parameters(2 * 32_000 + 4 * layer + 64, 4 * EXPERTS // 8)


def test_a_tied_output_layer_is_a_copy_on_another_stage() -> None:
    stages = [rank_parameters(DENSE, ParallelConfig(pipeline=2), stage).dense for stage in range(2)]
    assert stages == [64_000 + 2 * DENSE_LAYER, 64_000 + 2 * DENSE_LAYER + 64]


def test_state_is_shared_by_replicas_and_that_of_experts_by_theirs() -> None:
    parallel = {"tensor": 2, "data": 4, "sequence": True, "expert": 4}
    held = rank_parameters(MOE, ParallelConfig(**parallel), 0)
    memory = rank_memory(config(learner=learner(**parallel)), MOE, 0)
    stepped = held.dense // 4 + held.experts // 2  # 8 ranks are two replicas of 4 ranks' experts
    assert (memory.weights, memory.gradients) == (2 * held.total, 4 * held.total)
    assert (memory.optimizer, memory.offloaded, memory.host) == (12 * stepped, 0, 12 * stepped)
    offloaded = learner(**parallel) | {"offload_optimizer": True}
    memory = rank_memory(config(learner=offloaded), MOE, 0)
    assert (memory.optimizer, memory.offloaded, memory.host) == (4 * stepped, 8 * stepped, 20 * stepped)
    whole = learner(**parallel) | {"dtype": "float32"}
    memory = rank_memory(config(learner=whole), MOE, 0)
    assert (memory.optimizer, memory.snapshot) == (8 * stepped, 12 * stepped)


def test_a_node_holds_the_copies_of_all_its_ranks_while_a_checkpoint_is_under_way() -> None:
    settings = config(learner=learner(data=4), generator={"count": 2}, placement={"gpus_per_node": 2})
    nodes = host_memory(settings, DENSE, place(settings))
    copies = 2 * 12 * (model_parameters(DENSE) // 4)
    assert [(node.checkpoint, node.offloaded) for node in nodes] == [(copies, 0), (copies, 0), (0, 0)]
    assert checkpoint_bytes(DENSE) == 2 * copies


def test_a_node_holds_what_its_ranks_publish_and_what_its_generators_pull() -> None:
    weights = {"retention": 3.0}
    settings = config(learner=learner(data=4), generator={"count": 2}, placement={"gpus_per_node": 2}, weights=weights)
    nodes = host_memory(settings, DENSE, place(settings))
    size, share = update_bytes(settings, DENSE), assumed_delta(settings).bytes_share
    assert [node.published for node in nodes] == [int((5 + share) * size / 2)] * 2 + [0]
    assert [node.pulled for node in nodes] == [0, 0, 2 * int(1.2 * size)]


def test_a_generator_holds_its_copy_and_a_delta_or_those_ahead_of_an_anchor_up_to_a_fifth() -> None:
    def pulled(anchor_every: int, **changes: str) -> float:
        return pulled_copies(config(learner=learner() | changes, weights={"anchor_every": anchor_every}))

    share = assumed_delta(config(learner=learner())).bytes_share
    assert [pulled(n) for n in (1, 2, 3, 100)] == [1 + share, 1 + share, 1 + 2 * share, 1.2]
    assert (
        pulled(100, dtype="float32") == 1 + assumed_delta(config(learner=learner() | {"dtype": "float32"})).bytes_share
    )


def test_more_updates_a_step_change_more_and_in_float32_all() -> None:
    deltas = [assumed_delta(config(learner=learner(), updates_per_step=n, groups_per_step=n)) for n in (1, 2, 8, 64)]
    assert deltas == [(0.011, 0.0073), (0.021, 0.014), (0.036, 0.022), (0.036, 0.022)]
    assert assumed_delta(config(learner=learner() | {"dtype": "float32"})) == (1.0, 0.58)


def test_activations_of_a_dense_layer() -> None:
    norms = 2 * (2 * 64 + 4) + 2 * 2 * 64
    attention = 2 * 128 + 2 * (64 + 32 + 64) + 4 * 4 + 2 * 64
    layer = layer_bytes(DENSE, ParallelConfig(), 2)
    assert (layer.input, layer.attention, layer.feed_forward) == (128, norms + attention, 5 * 96 * 2)
    final, rotary = 2 * 64 + 4 + 2 * 2 * 64, 2 * 16
    kept = {
        "none": (4 * (norms + attention + 960), 0),
        "selective": (4 * (norms + attention), 960),
        "full": (4 * 128, norms + attention + 960),
    }
    for recompute, (expected, anew) in kept.items():
        settings = config(learner=learner() | {"recompute": recompute})
        assert held_bytes(settings, DENSE, 0) == (4096 * (expected + rotary + final), 4096 * (anew + layer.working)), (
            recompute
        )


def test_experts_keep_a_row_for_each_choice_of_a_token() -> None:
    row = 2 * (64 + 3 * 16) + 4
    assert layer_bytes(MOE, ParallelConfig(), 2).feed_forward == 2 * row + 5 * 8 + 20 * 2
    shared = layer_bytes(MOE, ParallelConfig(tensor=2, sequence=True, data=4, expert=8), 2)
    assert shared.feed_forward == (2 * row + 5 * 8 + 20 * 2) / 2


@pytest.mark.parametrize(
    ("parallel", "in_flight"),
    [
        ({"pipeline": 4}, [4, 3, 2, 1]),
        ({"pipeline": 2, "virtual_pipeline": 2}, [5, 3]),
    ],
)
def test_early_stages_hold_more_micro_batches(parallel: dict[str, int], in_flight: list[int]) -> None:
    settings = config(learner=learner(**parallel))
    layer = layer_bytes(DENSE, ParallelConfig(**parallel), 2)
    final, rotary = 2 * 64 + 4 + 2 * 2 * 64, 2 * 16
    last = parallel["pipeline"] - 1
    for stage, num in enumerate(in_flight):
        kept = num * (layer.attention + layer.feed_forward + rotary) + (final if stage == last else 0)
        assert held_bytes(settings, DENSE, stage).activations == 4096 * kept


def test_logits_are_chunks_or_the_output_layers_gradient() -> None:
    assert logits_bytes(config(learner=learner()), DENSE) == 12 * 4096 * 1000
    assert logits_bytes(config(learner=learner(tensor=2)), DENSE) == 8 * 4096 * 500
    large = msgspec.structs.replace(DENSE, vocab_size=1 << 20, hidden_size=1 << 11)
    assert logits_bytes(config(learner=learner()), large) == 6 * 64 * (1 << 20) + 6 * (1 << 31)


def test_an_engine_copies_key_and_value_heads_that_are_fewer_than_its_gpus() -> None:
    layer = 64 * (16 + 2 * 16) + 16 * 64 + (16 + 2 * 16) + 3 * 64 * 24 + 2 * 64
    assert engine_parameters(DENSE, EngineParallelConfig(tensor=4)) == 16_000 + 4 * layer + 64
    generator = {"dtype": "bfloat16", "max_total_tokens": 1000, "parallel": {"tensor": 4}}
    memory = engine_memory(config(generator=generator), DENSE)
    assert memory.kv_cache == 1000 * 2 * 4 * 1 * 16 * 2


def test_copies_of_attention_share_experts_and_requests() -> None:
    parallel = {"tensor": 1, "data": 4, "expert": 4}
    held = engine_parameters(MOE, EngineParallelConfig(**parallel))
    assert held == 64_000 + 16_000 + 4 * (MOE_LAYER + EXPERTS // 4) + 64
    generator = {"dtype": "float32", "max_total_tokens": 1000, "parallel": parallel}
    memory = engine_memory(config(generator=generator), MOE)
    assert (memory.weights, memory.kv_cache) == (4 * held, 250 * 2 * 4 * 2 * 32 * 4)


def test_an_update_is_the_whole_model() -> None:
    assert update_bytes(config(learner=learner(data=4)), DENSE) == 2 * model_parameters(DENSE)
