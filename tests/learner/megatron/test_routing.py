"""Routing replay: tokens go where the engine sent them, with the shares of the learner's own routers."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.batch import MicroBatch
from learner.megatron.policy import Policy
from tests.learner.megatron import tiny
from tests.learner.megatron.routes import Forced, random_routes

LAYERS, EXPERTS, TOP_K = 2, 4, 2
LENGTHS = [5, 9, 9, 12, 2, 30]
KINDS = ["qwen3-moe", "qwen3-moe-unnormalized"]


def routed(seed: int = 0, max_tokens: int = 4096) -> list[MicroBatch]:
    rng = np.random.default_rng(seed)

    def with_routes(micro: MicroBatch) -> MicroBatch:
        routes = random_routes(rng, micro.num_tokens, LAYERS, EXPERTS, TOP_K)
        return dataclasses.replace(micro, routed_experts=torch.from_numpy(routes))

    return [with_routes(micro) for micro in tiny.micro_batches(LENGTHS, max_tokens=max_tokens)]


def both(kind: str, path: Path, **learner: Any) -> tuple[Policy, Any]:
    tiny.build(path, kind)
    changes = {"learner": {"routing_replay": True, **learner}, "optimizer": {"clip_norm": 1e9}}
    reference = tiny.reference_class(kind).from_pretrained(path, experts_implementation="eager").eval()
    return Policy(tiny.config(path, **changes)), reference


def forced_logprobs(reference: Any, forced: Forced, micro: MicroBatch) -> torch.Tensor:
    """One sequence at a time, along its routes."""
    assert micro.routed_experts is not None
    rows: list[torch.Tensor] = []
    for start, end in pairwise(micro.sequence_starts.tolist()):
        forced.routes = micro.routed_experts[start:end].unflatten(1, (LAYERS, TOP_K))
        tokens = micro.token_ids[start:end]
        logprobs = torch.log_softmax(reference(tokens[None]).logits[0, :-1].float() / 0.8, -1)
        rows.append(torch.cat([torch.zeros(1), logprobs.gather(1, tokens[1:, None])[:, 0]]))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_along_the_routes(kind: str, tmp_path: Path) -> None:
    policy, reference = both(kind, tmp_path)
    (micro,) = routed()
    with torch.no_grad():
        expected = forced_logprobs(reference, Forced(reference), micro)
    torch.testing.assert_close(policy.logprobs([micro])[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_are_those_along_the_routes(kind: str, recompute: str, tmp_path: Path) -> None:
    policy, reference = both(kind, tmp_path, recompute=recompute)
    forced = Forced(reference)
    micros = routed(max_tokens=40)
    for micro in micros:
        tiny.masked_mean_loss(micro, forced_logprobs(reference, forced, micro), torch.zeros(0)).backward()
    policy.update(micros, tiny.masked_mean_loss)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, gradient in tiny.gradients(policy).items():
        wanted = tiny.of_saved(expected, name)
        assert float((gradient - wanted).norm()) <= 1e-5 * float(wanted.norm()) + 1e-7, name
    assert any("gate.weight" in name and bool(g.any()) for name, g in tiny.gradients(policy).items())


def test_other_routes_give_other_logprobs_and_none_are_replayed_for_the_probe(tmp_path: Path) -> None:
    policy, reference = both("qwen3-moe", tmp_path)
    (one,), (other,) = routed(0), routed(1)
    assert not torch.equal(policy.logprobs([one])[0], policy.logprobs([other])[0])
    tokens = one.token_ids[:5].int()
    with torch.no_grad():
        logits = reference(tokens[None].long()).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, tokens[1:, None].long())[:, 0]
    torch.testing.assert_close(policy.sequence_logprobs(tokens)[1:], expected, rtol=0, atol=1e-5)


def test_routes_without_replay_are_a_defect(tmp_path: Path) -> None:
    policy = Policy(tiny.config(tiny.build(tmp_path, "qwen3-moe")))
    with pytest.raises(AssertionError, match="routed experts without"):
        policy.logprobs(routed())
