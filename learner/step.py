"""One step: groups in, `updates_per_step` optimizer updates, and the numbers that tell what happened."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from common import wire
from common.config import Config
from common.versions import Lineages, Version
from learner.batch import MicroBatch, Sequence, completion_staleness, group_sequences, is_masked, pack, split_long
from learner.gspo import LossStats, gspo_loss, proximal
from learner.trainable import Trainable, UpdateResult


def train_step(
    policy: Trainable, groups: tuple[wire.TrainingGroup, ...], config: Config, version: Version, lineages: Lineages
) -> dict[str, float]:
    """Trains on the groups of the step that starts at `version` and returns its metrics."""
    shuffled = np.random.default_rng([config.seed, version.number])
    order = shuffled.permutation(len(groups))
    sequences = [group_sequences(groups[i], config, version, lineages, shuffled) for i in order]
    per_update = len(groups) // config.updates_per_step
    updates: list[list[Sequence]] = [
        [s for group in sequences[at : at + per_update] for s in group] for at in range(0, len(groups), per_update)
    ]
    max_tokens = config.learner.max_tokens_per_microbatch
    fitting = [split_long(update, max_tokens) for update in updates]
    step = _Step(policy, config, [pack(update, max_tokens) for update, _ in fitting])
    step.run()
    rejected = {"num_rejected": float(sum(num for _, num in fitting))}
    return {**batch_metrics(groups, config, version, lineages), **rejected, **step.metrics()}


class _Step:
    """The updates of one step, and what they leave behind."""

    def __init__(self, policy: Trainable, config: Config, updates: list[list[MicroBatch]]) -> None:
        self._policy, self._config, self._updates = policy, config, updates
        self._results: list[UpdateResult] = []
        self._stats: list[LossStats] = []
        self._losses: list[float] = []
        self._entropies: list[Tensor] = []
        self._differences: list[Tensor] = []
        self._num_empty = 0

    def run(self) -> None:
        """Makes the updates; the proximal logprobs of all but the first are taken before it."""
        at_start: list[list[Tensor | None]] = [[None] * len(micros) for micros in self._updates]
        if self._config.loss.proximal == "recompute":
            at_start[1:] = [[self._policy.logprobs(micro) for micro in micros] for micros in self._updates[1:]]
        for micros, proximals in zip(self._updates, at_start, strict=True):
            num_completions = sum(int(micro.loss_mask.sum()) for micro in micros)
            if num_completions:
                self._update(micros, proximals, num_completions)
            else:
                self._num_empty += 1

    def _update(self, micros: list[MicroBatch], proximals: list[Tensor | None], num_completions: int) -> None:
        at_start = {id(micro): logprobs for micro, logprobs in zip(micros, proximals, strict=True)}

        def loss(micro: MicroBatch, learner: Float[Tensor, " tokens"], entropy: Float[Tensor, " tokens"]) -> Tensor:
            centre = proximal(micro, learner, at_start[id(micro)], self._config.loss)
            value, stats = gspo_loss(micro, learner, centre, num_completions, self._config.loss)
            self._losses.append(float(value.detach()) * num_completions)
            self._stats.append(stats)
            self._entropies.append(entropy[micro.response_mask].double())
            self._differences.append((learner.detach() - micro.generator_logprobs)[micro.response_mask].abs())
            return value

        self._results.append(self._policy.update(micros, loss))

    def metrics(self) -> dict[str, float]:
        """The step's numbers, over all of its updates; NaN where nothing was trained."""
        skipped = self._num_empty + sum(result.skipped for result in self._results)
        row = {"skipped_updates": float(skipped), "num_tokens": float(self._num_tokens())}
        if not self._results:
            return row | dict.fromkeys(("loss", "grad_norm", "lr"), float("nan"))
        weight, log_ratio = self._joined("weight"), self._joined("log_ratio")
        differences = torch.cat(self._differences).double()
        low, high = self._mean("clipped_low"), self._mean("clipped_high")
        return row | {
            "loss": sum(self._losses) / len(weight),
            "grad_norm": float(np.mean([result.grad_norm for result in self._results])),
            "lr": self._results[-1].lr,
            "clip_fraction": low + high,
            "clip_fraction_low": low,
            "clip_fraction_high": high,
            "staleness_clip_fraction": self._mean("staleness_clipped"),
            "ratio_mean": float(log_ratio.exp().mean()),
            "weight_mean": float(weight.mean()),
            "effective_sample_share": float(weight.sum() ** 2 / (len(weight) * weight.square().sum()).clamp(min=1e-12)),
            "entropy": float(torch.cat(self._entropies).mean()),
            "logprob_difference_mean": float(differences.mean()),
            "logprob_difference_p99": float(differences.quantile(0.99)) if len(differences) < 1 << 24 else float("nan"),
        }

    def _num_tokens(self) -> int:
        return sum(micro.num_tokens for micros in self._updates for micro in micros)

    def _joined(self, name: str) -> Tensor:
        return torch.cat([getattr(stats, name) for stats in self._stats])

    def _mean(self, name: str) -> float:
        return float(self._joined(name).double().mean())


def batch_metrics(
    groups: tuple[wire.TrainingGroup, ...], config: Config, version: Version, lineages: Lineages
) -> dict[str, float]:
    """What the step was given: rewards, lengths, staleness, and how many completions the loss does not count."""
    pairs = [
        (completion, grade)
        for training in groups
        for completion, grade in zip(training.scored.group.completions, training.scored.grades, strict=True)
    ]
    graded = [grade for _, grade in pairs if grade.outcome.graded]
    staleness = [completion_staleness(completion, version, lineages) for completion, _ in pairs]
    masked = sum(not grade.outcome.graded or is_masked(completion, config) for completion, grade in pairs)
    return {
        "reward": float(np.mean([grade.reward for grade in graded])) if graded else float("nan"),
        "correct": float(np.mean([grade.correct for grade in graded])) if graded else float("nan"),
        "num_groups": float(len(groups)),
        "num_completions": float(len(pairs)),
        "num_masked": float(masked),
        "tokens_per_completion": float(np.mean([completion.num_tokens for completion, _ in pairs])),
        "staleness_mean": float(np.mean(staleness)),
        "staleness_max": float(np.max(staleness)),
    }
