"""The real engine: seeds, versions, logprobs, the prefix cache."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from common import wire
from common.config import GeneratorConfig, SamplingConfig
from common.errors import EngineError, GateError
from common.versions import Version
from common.vision import declare_vision_operators
from generator.weights import check_gate
from tests.generator.conftest import RunningEngine, until
from tests.models import write_tiny_model

PROMPT = np.array([2, 9, 12, 6, 7, 15], dtype=np.int32)
SHORT, LONG = SamplingConfig(max_tokens=24).on_wire(), SamplingConfig(max_tokens=300).on_wire()


def reference_logprobs(model: Path, token_ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """transformers' logprob of each token after the first."""
    declare_vision_operators()
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor([token_ids])).logits[0]
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].numpy()


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("other"), "qwen3", seed=1)


def test_a_seed_gives_the_same_completion_whatever_else_is_in_the_batch(running: RunningEngine) -> None:
    engine = running.engine

    async def sample() -> tuple[wire.Completion, list[wire.Completion]]:
        alone = await engine.generate(PROMPT, SHORT, seed=7, request_id="alone")
        many = [engine.generate(PROMPT, SHORT, seed=i, request_id=f"many-{i}") for i in range(32)]
        return alone, await asyncio.gather(*many)

    alone, many = running.run(sample())
    assert many[7].token_ids == alone.token_ids
    assert len({completion.token_ids for completion in many}) > 24


def test_greedy_company_does_not_change_what_a_seed_samples(running: RunningEngine) -> None:
    """Evaluations are greedy and share batches with training."""
    engine = running.engine
    greedy = SamplingConfig(max_tokens=24, temperature=0.0).on_wire()

    async def sample() -> tuple[list[wire.Completion], list[wire.Completion]]:
        alone = [engine.generate(PROMPT, SHORT, seed=i, request_id=f"plain-{i}") for i in range(64)]
        apart = await asyncio.gather(*alone)
        among = [engine.generate(PROMPT, SHORT, seed=i, request_id=f"among-{i}") for i in range(64)]
        company = [engine.generate(PROMPT[i % 3 :], greedy, seed=0, request_id=f"greedy-{i}") for i in range(16)]
        return apart, (await asyncio.gather(*company, *among))[16:]

    apart, among = running.run(sample())
    assert [c.token_ids for c in among] == [c.token_ids for c in apart]


def test_top_k_and_top_p_sample_only_from_what_they_keep(running: RunningEngine) -> None:
    declare_vision_operators()
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(running.model, dtype=torch.float32)
        probs = model(torch.tensor([PROMPT.tolist()])).logits[0, -1].softmax(-1)
    order = probs.argsort(descending=True)
    nucleus = order[: int((probs[order].cumsum(0) - probs[order] <= 0.5).sum())]

    async def sample(sampling: wire.Sampling, tag: str) -> set[int]:
        many = [running.engine.generate(PROMPT, sampling, seed=i, request_id=f"{tag}-{i}") for i in range(400)]
        return {int(wire.ints(c.token_ids)[0]) for c in await asyncio.gather(*many)}

    by_k = running.run(sample(SamplingConfig(max_tokens=1, top_k=3).on_wire(), "k"))
    by_p = running.run(sample(SamplingConfig(max_tokens=1, top_p=0.5).on_wire(), "p"))
    assert by_k == set(order[:3].tolist())
    assert by_p <= set(nucleus.tolist())
    assert len(by_p) > 1


def test_seeded_samples_follow_the_distribution(running: RunningEngine) -> None:
    async def sample() -> list[wire.Completion]:
        one = SamplingConfig(max_tokens=1).on_wire()
        many = [running.engine.generate(PROMPT, one, seed=i, request_id=f"one-{i}") for i in range(1500)]
        return await asyncio.gather(*many)

    first = np.bincount([wire.ints(c.token_ids)[0] for c in running.run(sample())], minlength=64)
    declare_vision_operators()
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(running.model, dtype=torch.float32)
        expected = model(torch.tensor([PROMPT.tolist()])).logits[0, -1].softmax(-1).double().numpy() * first.sum()
    chi_square = float(((first - expected) ** 2 / expected).sum())
    assert chi_square < 135  # 63 degrees of freedom: 1 in 2.7 million above


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_transformers_with_the_temperature_applied(
    running: RunningEngine, temperature: float
) -> None:
    sampling = SamplingConfig(max_tokens=24, temperature=temperature).on_wire()
    completion = running.run(running.engine.generate(PROMPT, sampling, seed=3, request_id=f"t{temperature}"))
    token_ids = [*PROMPT.tolist(), *wire.ints(completion.token_ids).tolist()]
    expected = reference_logprobs(running.model, token_ids, temperature)[len(PROMPT) - 1 :]
    assert np.abs(wire.floats(completion.logprobs) - expected).max() < 2e-5


def test_an_update_in_flight_gives_tokens_of_both_versions(running: RunningEngine) -> None:
    engine = running.engine
    before = engine.version
    assert before is not None

    async def update() -> list[wire.Completion]:
        tasks = [
            asyncio.create_task(engine.generate(PROMPT, LONG, seed=i, request_id=f"flight-{i}")) for i in range(16)
        ]
        await until(lambda: engine.load_now().num_running > 0, "the engine to begin")
        await engine.load(running.model, before.next())
        return await asyncio.gather(*tasks)

    completions = running.run(update())
    both = [c for c in completions if [span.version for span in c.spans()] == [before, before.next()]]
    assert both
    for completion in completions:
        completion.check()


def test_a_request_that_waits_through_an_update_counts_as_old_as_its_prefix(running: RunningEngine) -> None:
    """More requests than the engine takes at once: the rest may still find the prefix that the old weights made."""
    engine = running.engine
    before = engine.version
    assert before is not None

    async def update() -> list[wire.Completion]:
        many = [engine.generate(PROMPT, LONG, seed=i, request_id=f"queue-{i}") for i in range(400)]
        tasks = [asyncio.create_task(one) for one in many]
        await until(lambda: engine.load_now().num_waiting > 0, "requests to wait for their turn")
        await engine.load(running.model, before.next())
        return await asyncio.gather(*tasks)

    completions = running.run(update())
    assert {completion.spans()[0].version for completion in completions} == {before}
    assert any(completion.spans()[0].end == 1 for completion in completions)
    for completion in completions:
        completion.check()


def test_the_prefix_cache_carries_no_old_weights_into_new_requests(running: RunningEngine, other_model: Path) -> None:
    """A long prompt is cached under one version, and asked for again under other weights."""
    engine = running.engine
    prompt = np.tile(PROMPT, 30)
    greedy = SamplingConfig(max_tokens=1, temperature=0.0).on_wire()

    async def swap() -> tuple[wire.Completion, wire.Completion]:
        assert engine.version is not None
        await engine.generate(prompt, greedy, seed=0, request_id="prefix-old")
        await engine.load(other_model, engine.version.next())
        after = await engine.generate(prompt, greedy, seed=0, request_id="prefix-new")
        again = await engine.generate(prompt, greedy, seed=0, request_id="prefix-again")
        await engine.load(running.model, engine.version.next())
        return after, again

    for completion in running.run(swap()):
        token_ids = [*prompt.tolist(), *wire.ints(completion.token_ids).tolist()]
        expected = reference_logprobs(other_model, token_ids)[-1]
        assert abs(wire.floats(completion.logprobs)[0] - expected) < 2e-5


def test_the_gate_passes_the_learners_weights_and_stops_others(running: RunningEngine, other_model: Path) -> None:
    probe = np.arange(2, 60, dtype=np.int32)
    ours = running.run(running.engine.logprobs(probe))
    config = GeneratorConfig()
    assert check_gate(ours, reference_logprobs(running.model, probe.tolist()).astype(np.float32), config, "0.1") < 1e-4
    with pytest.raises(GateError, match=r"version 0\.1: found a largest difference of .*, expected at most 0\.0001"):
        check_gate(ours, reference_logprobs(other_model, probe.tolist()).astype(np.float32), config, "0.1")
    with pytest.raises(GateError, match=r"found 57 finite .* and 0 in the learner, expected 57 in both"):
        check_gate(ours, np.full(57, np.nan, np.float32), config, "0.1")


def test_in_bfloat16_the_gate_looks_at_mean_and_99th_percentile() -> None:
    config = GeneratorConfig(dtype="bfloat16", gate_mean=0.02, gate_p99=0.2)
    learners = np.zeros(1000, np.float32)
    ours = learners.copy()
    ours[:5] = -0.5  # five flips in a thousand are no stale engine
    assert check_gate(ours, learners, config, "0.1") == 0.5
    ours[:20] = -0.5
    with pytest.raises(GateError, match="99th percentile"):
        check_gate(ours, learners, config, "0.1")
    with pytest.raises(GateError, match="mean"):
        check_gate(np.full(1000, -0.03, np.float32), learners, config, "0.1")


def test_weights_that_are_not_there_are_an_error_and_the_engine_goes_on(running: RunningEngine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"could not load version 9\.9"):
        running.run(running.engine.load(tmp_path / "gone", Version(9, 9)))
    completion = running.run(running.engine.generate(PROMPT, SHORT, seed=1, request_id="after"))
    assert completion.num_tokens > 0
