"""Who runs where."""

from typing import Any

import msgspec
import pytest

import learner.megatron  # noqa: F401  # makes Megatron importable where there is no CUDA
from common.config import Config
from launch.placement import Engine, place


def config(gpus: int, *, engines: int = 1, engine_gpus: int = 1, **parallel: Any) -> Config:
    values = {
        "placement": {"gpus_per_node": gpus},
        "learner": {"parallel": parallel},
        "generator": {"count": engines, "parallel": {"tensor": engine_gpus}},
    }
    return msgspec.convert(values, Config)


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 2, "data": 4, "expert": 8},
        {"tensor": 4, "data": 2, "expert": 4},
        {"tensor": 2, "context": 2, "data": 2, "pipeline": 2, "expert": 2, "expert_tensor": 2},
        {"data": 4, "pipeline": 3, "expert": 2},
    ],
)
def test_coordinates_are_those_of_megatrons_groups(parallel: dict[str, int]) -> None:
    from megatron.core.parallel_state import RankGenerator

    settings = config(8, **parallel)
    sizes = settings.learner.parallel
    ranks = place(settings).ranks
    expert_data = sizes.num_stage_ranks // (sizes.expert * sizes.expert_tensor)
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(sizes.tensor, 1, sizes.data, sizes.pipeline, sizes.context, order)
    experts = RankGenerator(sizes.expert_tensor, sizes.expert, expert_data, sizes.pipeline, 1, order)
    rows = [
        (dense, "tp", "tensor"),
        (dense, "cp", "context"),
        (dense, "dp", "data"),
        (dense, "pp", "pipeline"),
        (experts, "tp", "expert_tensor"),
        (experts, "ep", "expert"),
        (experts, "dp", "expert_data"),
    ]
    for generator, token, name in rows:
        for group in generator.get_ranks(token):
            assert [getattr(ranks[rank], name) for rank in group] == list(range(len(group))), name


def test_learner_and_engines_share_a_node_and_no_gpu() -> None:
    placement = place(config(8, engines=2, engine_gpus=2, data=4))
    assert placement.num_nodes == 1
    assert [(rank.node, rank.gpu) for rank in placement.ranks] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert placement.engines == (Engine("generator-0", 0, (4, 5)), Engine("generator-1", 0, (6, 7)))


def test_an_engine_never_crosses_nodes() -> None:
    placement = place(config(8, engines=3, engine_gpus=4, data=6))
    assert [(engine.node, engine.gpus) for engine in placement.engines] == [
        (1, (0, 1, 2, 3)),
        (1, (4, 5, 6, 7)),
        (2, (0, 1, 2, 3)),
    ]
    assert placement.num_nodes == 3


def test_a_large_learner_fills_nodes() -> None:
    placement = place(config(4, data=8, pipeline=2))
    assert [rank.node for rank in placement.ranks] == [node for node in range(4) for _ in range(4)]
    assert placement.engines[0].node == 4
