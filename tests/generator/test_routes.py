"""The engine tells which experts it sent each token to: those of transformers, a cached prefix's too."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import wire
from common.config import Config
from common.learning import LearnerConfig
from common.sections import GeneratorConfig
from tests.generator.conftest import RunningEngine, running_engine
from tests.models import write_tiny_model

PROMPT = np.array([5, 9, 14, 7, 21, 8, 30, 11], np.int32)
LAYERS, TOP_K = 2, 2
SAMPLING = wire.Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=12, stop=(), stop_token_ids=())


@pytest.fixture(scope="module")
def routing(tmp_path_factory: pytest.TempPathFactory) -> Generator[RunningEngine]:
    """An engine of a model with experts, asked to tell its routes."""
    model = write_tiny_model(tmp_path_factory.mktemp("moe"), "qwen3_moe")
    config = Config(
        model=str(model),
        generator=GeneratorConfig(max_total_tokens=16_384),
        learner=LearnerConfig(routing_replay=True),
    )
    with running_engine(config) as running:
        yield running


def chosen_by_transformers(model: Path, token_ids: list[int]) -> np.ndarray:
    """Int[tokens, layers, top_k], sorted."""
    import transformers

    found: list[torch.Tensor] = []
    reference: Any = transformers.Qwen3MoeForCausalLM.from_pretrained(model).eval()
    for layer in reference.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _module, _args, output: found.append(output[2]))
    with torch.no_grad():
        reference(torch.tensor([token_ids]))
    return np.sort(torch.stack(found, dim=1).numpy(), axis=-1)


def test_routes_are_those_of_transformers_and_stay_so_where_the_prompt_is_cached(routing: RunningEngine) -> None:
    for seed in range(3):  # after the first, the prompt is in the prefix cache
        asked = routing.engine.generate(PROMPT, SAMPLING, seed=seed, request_id=f"r{seed}", routed_experts=True)
        completion: wire.Completion = routing.run(asked)
        token_ids = [*PROMPT.tolist(), *wire.ints(completion.token_ids).tolist()]
        routes = np.frombuffer(completion.routed_experts, np.uint8).reshape(len(token_ids) - 1, LAYERS, TOP_K)
        expected = chosen_by_transformers(routing.model, token_ids)[:-1]
        assert (np.sort(routes, axis=-1) == expected).all()


def test_nobody_pays_for_routes_that_are_not_asked_for(routing: RunningEngine) -> None:
    completion: wire.Completion = routing.run(routing.engine.generate(PROMPT, SAMPLING, seed=1, request_id="without"))
    assert completion.routed_experts == b""
