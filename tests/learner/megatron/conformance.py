"""One training step on any division over ranks, and the float64 reference of one process that it must equal."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from common import wire
from common.config import Config
from common.versions import Lineages, Version
from learner.batch import completion_staleness, pack, step_sequences
from learner.gspo import gspo_loss, proximal
from learner.ranks import Ranks
from learner.step import train_step
from tests.groups import completion, grade, training_group
from tests.learner.megatron import tiny
from tests.learner.plain import PlainPolicy
from tests.ranks import run_ranks

MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 4, "vocab_size": 64},
    "qwen3-tied": {"num_hidden_layers": 4, "vocab_size": 64},
    "qwen3-moe": {"num_hidden_layers": 4, "vocab_size": 64, "num_experts": 8},
}
VERSION = Version(0, 8)
LR, EPS = 0.02, 1e-3


@dataclass(frozen=True)
class Outcome:
    """What a step came to: metrics, clipped gradients and new weights by Hugging Face name."""

    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def config(model: Path, **parallel: Any) -> Config:
    """A step of one update in which both clips bind, the gradient norm does, and micro-batches are several."""
    return tiny.config(
        model,
        groups_per_step=10,
        group_size=4,
        updates_per_step=1,
        max_staleness=8,
        sampling={"temperature": 1.0, "max_tokens": 24},
        loss={"proximal": "interpolate", "clip_low": 3e-3, "clip_high": 4e-3, "staleness_clip": 0.01},
        optimizer={"lr": LR, "eps": EPS, "weight_decay": 0.1, "clip_norm": 0.3},
        learner={"max_tokens_per_microbatch": 90, "parallel": parallel},
    )


def groups(model: Path) -> tuple[wire.TrainingGroup, ...]:
    """Ragged groups with staleness 0 to 8, one of a single completion, some of whose grades failed."""
    rng = np.random.default_rng(0)
    reference = _reference(model)
    sizes = [4, 4, 4, 1, 4, 2, 4, 4, 3, 4]
    return tuple(_group(rng, visit, size, reference) for visit, size in enumerate(sizes))


def expected(model: Path) -> Outcome:
    """What the step comes to in one process, in float64, in plain torch."""
    reference = _reference(model)
    policy = PlainPolicy(_Logits(reference), lr=LR, clip_norm=0.3, eps=EPS, weight_decay=0.1)
    metrics = train_step(policy, groups(model), config(model), VERSION, Lineages())
    parameters = dict(reference.named_parameters())
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    return Outcome(metrics, gradients, {name: p.detach() for name, p in parameters.items()})


def run(model_of: dict[str, Path], jobs: dict[str, tuple[str, dict[str, Any]]], directory: Path) -> dict[str, Outcome]:
    """The outcome of each job (model, division) on as many processes as its division has ranks; all have as many."""
    sizes = {config(model_of[model], **parallel).learner.parallel.num_ranks for model, parallel in jobs.values()}
    (num_ranks,) = sizes
    directory.mkdir(parents=True)
    batches = {model: groups(model_of[model]) for model, _ in jobs.values()}
    run_ranks(num_ranks, directory, _run, model_of, batches, jobs, directory)
    return {name: _collect(directory, name, num_ranks) for name in jobs}


def _run(model_of: dict[str, Path], batches: dict[str, Any], jobs: dict[str, Any], directory: Path) -> None:
    from learner.megatron.policy import Policy

    for name, (model, parallel) in jobs.items():
        settings = config(model_of[model], **parallel)
        policy = Policy(settings)
        metrics = train_step(policy, batches[model], settings, VERSION, Lineages(), Ranks().gather)
        result = {"metrics": metrics, "gradients": tiny.gradients(policy)}
        result["weights"] = {weight: tensor.clone() for weight, tensor in policy.export()}
        torch.save(result, directory / f"{name}-{dist.get_rank()}.pt")


def _collect(directory: Path, name: str, num_ranks: int) -> Outcome:
    """The ranks' parts together; each tensor is handed out once, and all ranks tell the same metrics."""
    parts = [torch.load(directory / f"{name}-{rank}.pt") for rank in range(num_ranks)]
    assert len({json.dumps(part["metrics"]) for part in parts}) == 1, "ranks differ in their metrics"
    whole: dict[str, dict[str, torch.Tensor]] = {"gradients": {}, "weights": {}}
    for kind, tensors in whole.items():
        for part in parts:
            assert tensors.keys().isdisjoint(part[kind])
            tensors.update(part[kind])
    return Outcome(parts[0]["metrics"], **whole)


class _Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model(token_ids).logits


def _reference(model: Path) -> Any:
    kind = "qwen3-moe" if "moe" in model.name else "qwen3"
    return tiny.reference_class(kind).from_pretrained(model, dtype=torch.float64, experts_implementation="eager").eval()


@torch.no_grad()
def _logprobs(reference: Any, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    tokens = torch.from_numpy(np.concatenate([prompt, response])).long()
    logits = reference(tokens[None]).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[len(prompt) - 1 :, 0]


def _group(rng: np.random.Generator, visit: int, size: int, reference: Any) -> wire.TrainingGroup:
    token_ids = rng.integers(1, tiny.VOCAB, rng.integers(1, 9), dtype=np.int32)
    completions: list[wire.Completion] = []
    grades: list[wire.Grade] = []
    for i in range(size):
        response = rng.integers(1, tiny.VOCAB, rng.integers(1, 25), dtype=np.int32)
        sampled = _logprobs(reference, token_ids, response).numpy() + rng.normal(0, 0.05, len(response))
        logprobs = np.minimum(sampled, 0).astype(np.float32)
        ends = sorted({max(1, len(response) // 2), len(response)})
        spans = [wire.VersionSpan(end, Version(0, min(8, (visit + i) % 9 + k))) for k, end in enumerate(ends)]
        completions.append(completion(response, logprobs, spans, seed=i))
        correct = float(rng.integers(0, 2))
        grades.append(grade(None if visit == 4 and i == 2 else correct))
    return training_group(token_ids, completions, grades, visit=visit, name=f"set:{visit}")


def staleness_of(batch: tuple[wire.TrainingGroup, ...]) -> set[int]:
    """Which there are."""
    completions = [c for training in batch for c in training.scored.group.completions]
    return {completion_staleness(completion, VERSION, Lineages()) for completion in completions}


def mean_surrogate(model: Path) -> float:
    """The mean of |w s A| under the reference: what the loss is measured by."""
    settings = config(model)
    sequences = step_sequences(groups(model), settings, VERSION, Lineages(), np.random.default_rng(0))
    (micro,) = pack([sequence for group in sequences for sequence in group], 1 << 20)
    (learner,) = PlainPolicy(_Logits(_reference(model)), lr=LR).logprobs([micro])
    centre = proximal(micro, learner, None, settings.loss)
    _, stats = gspo_loss(micro, learner, centre, len(micro.advantages), settings.loss)
    return float((stats.weight * stats.log_ratio.exp() * micro.advantages).abs().mean())
