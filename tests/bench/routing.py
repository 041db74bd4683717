"""Routing replay: how far engine and learner are apart on tiny models with experts, without and with it."""

import asyncio
import dataclasses
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import wire
from common.config import Config
from common.learning import LearnerConfig
from common.sections import DataConfig, GeneratorConfig, SamplingConfig
from learner.batch import MicroBatch, Sequence, pack
from tests.bench.report import Figure
from tests.generator.conftest import running_engine
from tests.models import write_tiny_model

NUM_COMPLETIONS, MAX_TOKENS, PROMPT_TOKENS = 128, 64, 8
SAMPLING = wire.Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=MAX_TOKENS, stop=(), stop_token_ids=())
MODELS: dict[str, dict[str, int]] = {
    "8 experts, 2 a token, 2 layers": {"num_experts": 8},
    "64 experts, 8 a token, 4 layers": {"num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 4},
}


class Distance(NamedTuple):
    """Of the learner's logprobs from the engine's, over response tokens: mean and 99th percentile of |x|, and k3."""

    mean: float
    p99: float
    k3: float


def run() -> list[Figure]:
    """Each model in its turn."""
    figures: list[Figure] = []
    for name, shape in MODELS.items():
        with tempfile.TemporaryDirectory() as directory:
            model = write_tiny_model(Path(directory), "qwen3_moe", eos_token_id=None, **shape)
            figures += _figures(name, _config(model))
    return figures


def _config(model: Path) -> Config:
    return Config(
        model=str(model),
        data=DataConfig(train="unused.jsonl"),
        sampling=SamplingConfig(max_tokens=MAX_TOKENS),
        generator=GeneratorConfig(dtype="bfloat16", max_total_tokens=32_768),
        learner=LearnerConfig(dtype="bfloat16", routing_replay=True),
    )


def _figures(name: str, config: Config) -> list[Figure]:
    from learner.megatron.policy import Policy

    micros = pack(_sampled(config), 4096)
    policy = Policy(config)
    replayed = _distance(micros, policy.logprobs(micros))
    alone = [dataclasses.replace(micro, routed_experts=None) for micro in micros]
    with _routes_of(policy) as routes:
        own = _distance(micros, policy.logprobs(alone))
        share = _share_elsewhere(micros, routes)
    figures = [Figure(f"{name}: tokens that the learner sends elsewhere, in a layer", 100 * share, "%")]
    for measure in Distance._fields:
        value, without = getattr(replayed, measure), getattr(own, measure)
        beside = f"{without:.4g} without, {value / without:.3f} of it"
        figures.append(Figure(f"{name}: logprob difference, {measure}, with replay", value, "", beside))
    return figures


def _sampled(config: Config) -> list[Sequence]:
    """Completions of random prompts with the engine's routes."""
    prompts = np.random.default_rng(0).integers(2, 64, (NUM_COMPLETIONS, PROMPT_TOKENS), dtype=np.int32)
    with running_engine(config) as running:

        async def sample() -> list[wire.Completion]:
            asked = (
                running.engine.generate(prompt, SAMPLING, seed=i, request_id=f"r{i}", routed_experts=True)
                for i, prompt in enumerate(prompts)
            )
            return await asyncio.gather(*asked)

        completions: list[wire.Completion] = running.run(sample())
    return [_sequence(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _sequence(prompt: np.ndarray, completion: wire.Completion) -> Sequence:
    num_seen = len(prompt) + completion.num_tokens - 1
    routes = np.frombuffer(completion.routed_experts, np.uint8).reshape(num_seen, -1)
    return Sequence(
        prompt=prompt,
        response=wire.ints(completion.token_ids),
        generator_logprobs=wire.floats(completion.logprobs),
        advantage=0.0,
        staleness=0,
        routed_experts=np.concatenate([routes, routes[-1:]]),
    )


def _distance(micros: list[MicroBatch], logprobs: list[Tensor]) -> Distance:
    pairs = [
        (own[micro.response_mask].double(), micro.generator_logprobs[micro.response_mask].double())
        for micro, own in zip(micros, logprobs, strict=True)
    ]
    difference = torch.cat([own - engine for own, engine in pairs])
    k3 = (difference.expm1() - difference).mean()
    return Distance(float(difference.abs().mean()), float(difference.abs().quantile(0.99)), float(k3))


@contextmanager
def _routes_of(policy: Any) -> Generator[list[Tensor]]:
    """The routers' choices inside the block, Bool[tokens, experts], micro-batch by micro-batch, layer by layer."""
    from megatron.core.transformer.moe.router import TopKRouter

    found: list[Tensor] = []
    routers = [module for piece in policy._pieces for module in piece.modules() if isinstance(module, TopKRouter)]
    hooks = [router.register_forward_hook(lambda _module, _args, output: found.append(output[1])) for router in routers]
    yield found
    for hook in hooks:
        hook.remove()


def _share_elsewhere(micros: list[MicroBatch], routes: list[Tensor]) -> float:
    """Share of (token, layer) whose experts are not those of the engine."""
    num_layers = len(routes) // len(micros)
    elsewhere: list[Tensor] = []
    for number, micro in enumerate(micros):
        assert micro.routed_experts is not None
        engine = micro.routed_experts.unflatten(1, (num_layers, -1)).long()
        for layer in range(num_layers):
            own = routes[number * num_layers + layer]
            chosen = torch.zeros_like(own).scatter(1, engine[:, layer], value=True)
            elsewhere.append((chosen != own).any(1))
    return float(torch.cat(elsewhere).double().mean())
