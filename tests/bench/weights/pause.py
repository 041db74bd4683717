"""`python -m tests.bench weights.pause`: how long an engine stands still for new weights, and whom that disturbs.

Real engines, at each load eight requests in flight, or none: with requests the pause has in it the rest of the forward
step that is under way. Of several loads the median. A request is disturbed if it is aborted, or ends with fewer tokens
than were asked for.
"""

import asyncio
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.config import Config, GeneratorConfig
from common.sections import SamplingConfig
from tests.bench.report import Figure
from tests.generator.conftest import RunningEngine, running_engine
from tests.models import Architecture, write_tiny_model

NUM_LOADS, NUM_REQUESTS = 7, 8
PROMPT = np.arange(2, 12, dtype=np.int32)


class Model(NamedTuple):
    """A model of random weights, and how many tokens long its requests are."""

    name: str
    architecture: Architecture
    changes: dict[str, Any]
    num_tokens: int


LARGER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "head_dim": 64,
    "num_key_value_heads": 12,
}
MODELS = (
    Model("tiny, dense", "qwen3", {}, 400),
    Model("tiny, experts", "qwen3_moe", {}, 400),
    Model("114 million parameters, dense", "qwen3", LARGER, 40),
)


def run() -> list[Figure]:
    """Each model, with requests in flight and without."""
    figures: list[Figure] = []
    for model in MODELS:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            path = write_tiny_model(Path(directory) / "model", model.architecture, eos_token_id=None, **model.changes)
            config = Config(model=str(path), generator=GeneratorConfig(max_total_tokens=16_384))
            with running_engine(config) as running:
                for num_requests in (NUM_REQUESTS, 0):
                    pause_s, disturbed = running.run(_loads(running, model.num_tokens, num_requests))
                    name = f"{model.name}, {num_requests} requests in flight"
                    figures.append(Figure(f"{name}: pause", 1000 * pause_s, "ms"))
                    if num_requests:
                        figures.append(Figure(f"{name}: disturbed", 100 * disturbed, "%"))
    return figures


async def _loads(running: RunningEngine, num_tokens: int, num_requests: int) -> tuple[float, float]:
    """The median pause, and the share of the requests that were disturbed."""
    engine, sampling = running.engine, SamplingConfig(max_tokens=num_tokens).on_wire()
    pauses: list[float] = []
    completions: list[Any] = []
    for number in range(NUM_LOADS):
        requests = [
            asyncio.create_task(engine.generate(PROMPT, sampling, seed=i, request_id=f"{num_requests}-{number}-{i}-"))
            for i in range(num_requests)
        ]
        await asyncio.sleep(0.5 if num_requests else 0.0)
        assert engine.version is not None
        pauses.append(await engine.load(running.model, engine.version.next()))
        ended = await asyncio.gather(*requests)
        assert not ended or any(len(completion.spans()) > 1 for completion in ended), "none was in flight"
        completions += ended
    num_disturbed = sum(completion.num_tokens != num_tokens for completion in completions)
    return statistics.median(pauses), num_disturbed / max(len(completions), 1)
