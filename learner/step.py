"""One step: groups in, `updates_per_step` optimizer updates, and the numbers that tell what happened."""

import time
from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from common import wire
from common.config import Config
from common.errors import StallError
from common.versions import Lineages, Version
from learner.batch import (
    MicroBatch,
    Sequence,
    completion_staleness,
    group_penalties,
    is_masked,
    pack,
    split_long,
    step_sequences,
)
from learner.gspo import gspo_loss, outside_trust_region, proximal
from learner.kl import kl_loss
from learner.measures import Measures, add_up, measure, summarize
from learner.record import Stopwatch
from learner.trainable import BatchShare, Trainable, UpdateResult

Gather = Callable[[bytes], list[bytes]]
_TIMEOUT, _ERROR = wire.Outcome.TIMEOUT, wire.Outcome.ERROR


def train_step(
    policy: Trainable,
    groups: tuple[wire.TrainingGroup, ...],
    config: Config,
    version: Version,
    lineages: Lineages,
    gather: Gather = lambda own: [own],
    watch: Stopwatch | None = None,
) -> dict[str, float]:
    """Trains on the groups of the step that starts at `version` and returns its metrics, those of all ranks.

    Args:
        policy: This rank's.
        groups: Of the step: all of them, the same on every rank.
        config: Of the run.
        version: Of the weights.
        lineages: To tell staleness.
        gather: The bytes of every rank, given this rank's.
        watch: Takes the time of `recompute`, `forward_backward` and `optimizer`; None where nobody asks.
    """
    shuffled = np.random.default_rng([config.seed, version.number])
    order = shuffled.permutation(len(groups))
    sequences = step_sequences((groups[i] for i in order), config, version, lineages, shuffled)
    per_update = len(groups) // config.updates_per_step
    updates: list[list[Sequence]] = [
        [s for group in sequences[at : at + per_update] for s in group] for at in range(0, len(groups), per_update)
    ]
    fitting = [split_long(update, config.learner.max_tokens_per_microbatch) for update in updates]
    shares = [_Update.of(update, config, policy.share) for update, _ in fitting]
    step = _Step(policy, config, shares, watch or Stopwatch())
    step.run()
    rejected = {"num_rejected": float(sum(num for _, num in fitting))}
    return {**batch_metrics(groups, config, version, lineages), **rejected, **step.metrics(gather)}


class _Update(NamedTuple):
    """The sequences of one optimizer update.

    Attributes:
        micros: This rank's.
        num_completions: N, over all ranks.
    """

    micros: list[MicroBatch]
    num_completions: int

    @classmethod
    def of(cls, sequences: list[Sequence], config: Config, share: BatchShare) -> Self:
        """This rank's share of an update."""
        ranks = {"rank": share.rank, "num_ranks": share.num_ranks, "multiple": share.multiple}
        return cls(pack(sequences, config.learner.max_tokens_per_microbatch, **ranks), len(sequences))


class _Step:
    """The updates of one step, and what they leave behind."""

    def __init__(self, policy: Trainable, config: Config, updates: list[_Update], watch: Stopwatch) -> None:
        self._policy, self._config, self._updates, self._watch = policy, config, updates, watch
        self._results: list[UpdateResult] = []
        self._measured: list[Measures] = []
        self._reference: dict[int, Tensor] = {}
        self._num_empty = 0
        self._at_start: dict[int, Tensor] = {}

    def run(self) -> None:
        """Makes the updates; the logprobs at the start of the step, and the reference's, are taken before them."""
        with self._watch("recompute"):
            self._recompute()
        for update in self._updates:
            if update.num_completions:
                began = time.monotonic()
                self._update(update)
                optimizer_s = self._results[-1].optimizer_s
                self._watch.add("forward_backward", time.monotonic() - began - optimizer_s)
                self._watch.add("optimizer", optimizer_s)
            else:
                self._num_empty += 1

    def _recompute(self) -> None:
        every = [micro for update in self._updates for micro in update.micros]
        if self._config.loss.kl_coefficient > 0 and every:
            self._reference = _of_each(every, self._policy.reference_logprobs(every))
        # of the first update as few as may be: it trains on its own logprobs, and tells how far these are from them
        firsts = [micro for update in self._updates[:1] for micro in update.micros[: self._policy.share.multiple]]
        chosen = firsts + [micro for update in self._updates[1:] for micro in update.micros]
        if self._config.loss.proximal == "recompute" and chosen:
            self._at_start = _of_each(chosen, self._policy.logprobs(chosen))

    def _update(self, update: _Update) -> None:
        num, unmoved = update.num_completions, all(result.skipped for result in self._results)

        def loss(micro: MicroBatch, learner: Float[Tensor, " tokens"], entropy: Float[Tensor, " tokens"]) -> Tensor:
            at_start = None if unmoved else self._at_start.get(id(micro))
            centre = proximal(micro, learner, at_start, self._config.loss)
            value, stats = gspo_loss(micro, learner, centre, num, self._config.loss)
            kl = self._kl(micro, learner, num)
            if kl is not None:
                value = value + self._config.loss.kl_coefficient * kl
            if self._policy.share.speaks:
                total, divergence = _total(value, num), _total(kl, num)
                noise = self._noise(micro, learner.detach()) if unmoved else None
                self._measured.append(measure(micro, stats, total, divergence, learner.detach(), entropy, noise))
            return value

        self._results.append(self._policy.update(update.micros, loss))

    def _noise(self, micro: MicroBatch, learner: Tensor) -> Tensor | None:
        """Where s is outside the clip before any update of the step; None where no other forward pass tells.

        With `recompute` that is the learner's own other pass, and not the one that the update trains on.
        """
        loss, at_start = self._config.loss, self._at_start.get(id(micro))
        if loss.proximal == "recompute" and at_start is None:
            return None
        return outside_trust_region(micro, learner, proximal(micro, learner, at_start, loss), loss)

    def _kl(self, micro: MicroBatch, learner: Tensor, num_completions: int) -> Tensor | None:
        """The micro-batch's share of the divergence from the reference; None where there is none."""
        reference = self._reference.get(id(micro))
        return None if reference is None else kl_loss(micro, learner, reference, num_completions)

    def metrics(self, gather: Gather) -> dict[str, float]:
        """The step's numbers, over all of its updates and ranks; NaN where nothing was trained."""
        measured = add_up([Measures.from_bytes(part) for part in gather(add_up(self._measured).to_bytes())])
        nonfinite = sum(result.skipped for result in self._results)
        norms = [result.grad_norm for result in self._results]
        return {
            **summarize(measured, self._config.sampling.max_tokens, self._config.loss.kl_coefficient),
            "skipped_updates": float(self._num_empty + nonfinite),
            "nonfinite_updates": float(nonfinite),
            "grad_norm": float(np.mean(norms)) if norms else float("nan"),
            "lr": self._results[-1].lr if self._results else float("nan"),
        }


def _total(share: Tensor | None, num_completions: int) -> float:
    """The sum over completions of which a micro-batch's share is the N-th part; NaN where there is none."""
    return float("nan") if share is None else float(share.detach()) * num_completions


def _of_each(micros: list[MicroBatch], found: list[Tensor]) -> dict[int, Tensor]:
    """What was found for each micro-batch; nothing on a rank that has no logprobs."""
    return {id(micro): logprobs for micro, logprobs in zip(micros, found, strict=False)}


class SkipLimit:
    """Stops a run whose steps do not train what they should."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._num_in_a_row = 0

    def count(self, metrics: dict[str, float]) -> None:
        """Takes note of a step.

        Raises:
            StallError: It is the last of `optimizer.max_skipped_steps` in a row in which a gradient was no finite
                number, were it of one update among many, or no update was made.
        """
        nothing = metrics["skipped_updates"] == self._config.updates_per_step
        bad = nothing or metrics["nonfinite_updates"] > 0
        self._num_in_a_row = self._num_in_a_row + 1 if bad else 0
        if self._num_in_a_row >= (limit := self._config.optimizer.max_skipped_steps):
            raise StallError(
                f"found {self._num_in_a_row} steps in a row with a gradient that is no finite number, or without any "
                f"update (of the last one's {self._config.updates_per_step} updates {metrics['skipped_updates']:g} "
                f"were skipped, {metrics['nonfinite_updates']:g} for their gradients), expected fewer than "
                f"optimizer.max_skipped_steps = {limit}"
            )


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
    correctness = [{g.correct for g in training.scored.grades if g.outcome.graded} for training in groups]
    staleness = [completion_staleness(completion, version, lineages) for completion, _ in pairs]
    failed = [sum(grade.outcome is outcome for _, grade in pairs) for outcome in (_TIMEOUT, _ERROR)]
    truncated = sum(grade.outcome.graded and is_masked(completion, config) for completion, grade in pairs)
    return {
        "reward": float(np.mean([grade.reward for grade in graded])) if graded else float("nan"),
        "correct": float(np.mean([grade.correct for grade in graded])) if graded else float("nan"),
        "overlong_penalty": _mean_penalty(groups, config),
        "num_groups": float(len(groups)),
        "num_groups_right": float(sum(known == {1.0} for known in correctness)),
        "num_groups_wrong": float(sum(known == {0.0} for known in correctness)),
        "num_completions": float(len(pairs)),
        "num_late": float(len(groups) * config.group_size - len(pairs)),
        "num_masked": float(sum(failed) + truncated),
        "num_masked_timeout": float(failed[0]),
        "num_masked_error": float(failed[1]),
        "num_masked_truncated": float(truncated),
        "tokens_per_completion": float(np.mean([completion.num_tokens for completion, _ in pairs])),
        "staleness_mean": float(np.mean(staleness)),
        "staleness_max": float(np.max(staleness)),
    }


def _mean_penalty(groups: tuple[wire.TrainingGroup, ...], config: Config) -> float:
    """Of the graded completions; `reward` is the mean before it."""
    if config.loss.overlong_buffer == 0:
        return 0.0
    graded = [grade.outcome.graded for training in groups for grade in training.scored.grades]
    penalties = torch.cat([group_penalties(training.scored.group, config) for training in groups])
    return float(penalties[torch.tensor(graded)].mean())
