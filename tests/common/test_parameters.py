"""Parameters of a rank, in numbers written out for a small model."""

from typing import Any

import pytest

from common.parameters import rank_parameters
from common.sections import ParallelConfig
from common.shape import ModelShape

DENSE: dict[str, Any] = {
    "architectures": ("Qwen3ForCausalLM",),
    "vocab_size": 100,
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "intermediate_size": 10,
}
MOE = DENSE | {
    "architectures": ("Qwen3MoeForCausalLM",),
    "num_experts": 4,
    "moe_intermediate_size": 6,
}
TABLE = 100 * 8
ATTENTION = 2 * (8 * 8) + 2 * (8 * 4)  # query and output, key and value
NORMS = 2 * 8 + 2 * 2
MLP = 3 * 8 * 10
EXPERT = 3 * 8 * 6
ROUTER = 8 * 4


@pytest.mark.parametrize(
    ("shape", "parallel", "expected"),
    [
        (DENSE, {}, 2 * TABLE + 8 + 4 * (ATTENTION + MLP + NORMS)),
        (DENSE | {"tie_word_embeddings": True}, {}, TABLE + 8 + 4 * (ATTENTION + MLP + NORMS)),
        (DENSE, {"tensor": 2}, TABLE + 8 + 4 * ((ATTENTION + MLP) // 2 + NORMS)),
        (DENSE, {"pipeline": 2}, TABLE + 8 + 2 * (ATTENTION + MLP + NORMS)),
        (DENSE, {"data": 4, "context": 2}, 2 * TABLE + 8 + 4 * (ATTENTION + MLP + NORMS)),
        (MOE, {"data": 2, "expert": 2}, 2 * TABLE + 8 + 4 * (ATTENTION + 2 * EXPERT + ROUTER + NORMS)),
        (
            MOE,
            {"tensor": 2, "data": 2, "expert": 2, "expert_tensor": 2},
            TABLE + 8 + 4 * (ATTENTION // 2 + EXPERT + ROUTER + NORMS),
        ),
    ],
)
def test_a_rank_holds_its_part_of_what_is_shared_and_all_of_the_rest(
    shape: dict[str, Any], parallel: dict[str, int], expected: int
) -> None:
    assert rank_parameters(ModelShape(**shape), ParallelConfig(**parallel)) == expected
