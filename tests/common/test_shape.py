"""Whether a model can be divided over ranks: each refusal names the numbers."""

from typing import Any

import msgspec
import pytest

from common.architectures import QWEN3, QWEN3_MOE
from common.errors import ConfigError
from common.learning import LearnerConfig, ParallelConfig
from common.shape import ModelShape, check_division, check_experts

DENSE: dict[str, Any] = {
    "architectures": [QWEN3],
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
}
MOE = DENSE | {"architectures": [QWEN3_MOE], "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize(
    ("shape", "parallel", "message"),
    [
        (
            DENSE,
            {"tensor": 3},
            "tensor: found 3, expected a divisor of the model's num_attention_heads = 8",
        ),
        (DENSE, {"tensor": 8}, "found 8, expected a divisor of the model's num_key_value_heads = 4"),
        (DENSE | {"vocab_size": 101}, {"tensor": 2}, "found 2, expected a divisor of the model's vocab_size = 101"),
        (DENSE | {"intermediate_size": 97}, {"tensor": 2}, "the model's intermediate_size = 97"),
        (
            DENSE,
            {"pipeline": 4},
            "virtual_pipeline: found 4, expected a divisor of the model's num_hidden",
        ),
        (DENSE, {"pipeline": 2, "virtual_pipeline": 2}, "found 4, expected a divisor"),
        (DENSE, {"data": 2, "expert": 2}, "learner.parallel.expert: found 2, expected 1: the model has no experts"),
        (DENSE, {"data": 2, "expert_tensor": 2}, "learner.parallel.expert_tensor: found 2, expected 1"),
        (
            MOE,
            {"data": 3, "expert": 3},
            "expert: found 3, expected a divisor of the model's num_experts = 8",
        ),
        (MOE, {"data": 5, "expert_tensor": 5}, "expected a divisor of the model's moe_intermediate_size = 24"),
        (MOE, {"tensor": 2, "expert": 2}, "learner.parallel.sequence: found false with learner.parallel.tensor = 2"),
        (
            MOE,
            {"tensor": 2, "sequence": True},
            "learner.parallel.expert_tensor: found 1 with expert = 1",
        ),
    ],
)
def test_a_division_that_leaves_a_rest_is_refused(
    shape: dict[str, Any], parallel: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_division(msgspec.convert(shape, ModelShape), msgspec.convert(parallel, ParallelConfig))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "parallel"),
    [
        (DENSE, {"tensor": 4, "pipeline": 3, "virtual_pipeline": 2, "context": 2, "data": 5}),
        (MOE, {"tensor": 2, "sequence": True, "data": 4, "expert": 8}),
    ],
)
def test_a_division_without_rest_passes(shape: dict[str, Any], parallel: dict[str, Any]) -> None:
    check_division(msgspec.convert(shape, ModelShape), msgspec.convert(parallel, ParallelConfig))


@pytest.mark.parametrize(
    ("dtype", "sizes", "message"),
    [
        ("bfloat16", {"moe_intermediate_size": 20}, "moe_intermediate_size / learner.parallel.expert_tensor = 10"),
        ("float32", {"moe_intermediate_size": 20}, "expected a multiple of 4 there"),
        (
            "bfloat16",
            {"hidden_size": 36},
            "found bfloat16 with a model whose hidden_size = 36, expected a multiple of 8",
        ),
    ],
)
def test_experts_with_rows_of_broken_16_bytes_are_refused(dtype: str, sizes: dict[str, int], message: str) -> None:
    learner = msgspec.convert({"dtype": dtype, "parallel": {"tensor": 2, "expert_tensor": 2}}, LearnerConfig)
    with pytest.raises(ConfigError) as caught:
        check_experts(msgspec.convert(MOE | sizes, ModelShape), learner)
    assert message in str(caught.value)
    check_experts(msgspec.convert(MOE | {"moe_intermediate_size": 32}, ModelShape), learner)
    check_experts(msgspec.convert(DENSE | sizes, ModelShape), learner)
