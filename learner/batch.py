"""A step's groups as packed micro-batches."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from common import wire
from common.config import Config
from common.versions import Lineages, Version
from learner.advantage import group_advantages, overlong_penalty
from learner.packing import plan


class Sequence(NamedTuple):
    """A prompt with one completion, ready to be packed.

    Attributes:
        prompt: Token ids, int32, shape [p].
        response: Token ids, int32, shape [r], r >= 1.
        generator_logprobs: float32, shape [r].
        advantage: Of the completion in its group.
        staleness: Of the completion.
        routed_experts: Of each token, layer by layer, uint8, shape [p + r, layers * top_k]; None where the learner
            chooses itself.
    """

    prompt: np.ndarray
    response: np.ndarray
    generator_logprobs: np.ndarray
    advantage: float
    staleness: int
    routed_experts: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and response."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed head to tail: what one forward pass sees.

    Attributes:
        token_ids: Int[T].
        position_ids: Int[T], from 0 in each sequence.
        sequence_starts: Int[S+1], int32: where each sequence begins, and T.
        response_mask: Bool[T], the sampled tokens.
        sequence_of_token: Int[T].
        generator_logprobs: Float[T], NaN outside the response.
        advantages: Float[S].
        staleness: Int[S].
        loss_mask: Bool[S], which completions the loss counts.
        routed_experts: UInt8[T, layers * top_k]; None where the learner chooses itself.
    """

    token_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    sequence_starts: Int[Tensor, " sequences_and_end"]
    response_mask: Bool[Tensor, " tokens"]
    sequence_of_token: Int[Tensor, " tokens"]
    generator_logprobs: Float[Tensor, " tokens"]
    advantages: Float[Tensor, " sequences"]
    staleness: Int[Tensor, " sequences"]
    loss_mask: Bool[Tensor, " sequences"]
    routed_experts: UInt8[Tensor, "tokens choices"] | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @cached_property
    def lengths(self) -> Int[Tensor, " sequences"]:
        """Tokens of each sequence."""
        return self.sequence_starts.diff().long()

    @cached_property
    def response_lengths(self) -> Float[Tensor, " sequences"]:
        """Tokens of each response, float64."""
        return torch.segment_reduce(self.response_mask.double(), "sum", lengths=self.lengths, unsafe=True)


def step_sequences(
    groups: Iterable[wire.TrainingGroup],
    config: Config,
    current: Version,
    lineages: Lineages,
    shuffled: np.random.Generator,
) -> list[list[Sequence]]:
    """The completions of each group that the loss counts: graded, and not masked for their length.

    Args:
        groups: At least one, scored, with their prompts.
        config: Of the run.
        current: The learner's version.
        lineages: To tell staleness.
        shuffled: Permutes the rewards where `loss.shuffle_rewards` is set.
    """
    groups = tuple(groups)
    graded = [[grade.outcome.graded for grade in training.scored.grades] for training in groups]
    rewards = [_rewards(*pair, config, shuffled) for pair in zip(groups, graded, strict=True)]
    advantages = group_advantages(
        _padded(rewards, torch.float64), _padded(graded, torch.bool), config.loss.advantage
    ).tolist()
    staleness_of = partial(completion_staleness, current=current, lineages=lineages)
    return [_sequences(*each, config, staleness_of) for each in zip(groups, graded, advantages, strict=True)]


def _rewards(
    training: wire.TrainingGroup, graded: list[bool], config: Config, shuffled: np.random.Generator
) -> list[float]:
    """Of a group's completions, less the penalty for their lengths."""
    rewards = [grade.reward for grade in training.scored.grades]
    if config.loss.overlong_buffer:
        penalties = group_penalties(training.scored.group, config).tolist()
        rewards = [reward - penalty for reward, penalty in zip(rewards, penalties, strict=True)]
    if config.loss.shuffle_rewards:
        known = np.flatnonzero(graded)
        for place, drawn in zip(known, [rewards[i] for i in shuffled.permutation(known)], strict=True):
            rewards[place] = drawn
    return rewards


def _padded(rows: list[list[Any]], dtype: torch.dtype) -> Tensor:
    """Rows of different lengths as one tensor, with zeros behind them."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=dtype)


def _sequences(
    training: wire.TrainingGroup,
    graded: list[bool],
    advantages: list[float],
    config: Config,
    staleness_of: Callable[[wire.Completion], int],
) -> list[Sequence]:
    prompt = wire.ints(training.prompt.token_ids)
    return [
        Sequence(
            prompt=prompt,
            response=wire.ints(completion.token_ids),
            generator_logprobs=wire.floats(completion.logprobs),
            advantage=advantages[i],
            staleness=staleness_of(completion),
            routed_experts=_routed_experts(completion, len(prompt) + completion.num_tokens),
        )
        for i, completion in enumerate(training.scored.group.completions)
        if graded[i] and not is_masked(completion, config)
    ]


def group_penalties(group: wire.Group, config: Config) -> Float[Tensor, " group"]:
    """What the rewards of a group's completions lose for their lengths. The ledger's filter does not see it."""
    num_tokens = torch.tensor([completion.num_tokens for completion in group.completions])
    return overlong_penalty(
        num_tokens, config.sampling.max_tokens, config.loss.overlong_buffer, config.loss.overlong_factor
    )


def completion_staleness(completion: wire.Completion, current: Version, lineages: Lineages) -> int:
    """Updates between a completion's oldest token and the learner."""
    return _oldest(completion.versions, current, lineages)


@lru_cache(maxsize=1024)  # short completions have the same few spans
def _oldest(versions: bytes, current: Version, lineages: Lineages) -> int:
    return max(lineages.staleness(span.version, current) for span in wire.spans(versions))


def is_masked(completion: wire.Completion, config: Config) -> bool:
    """Whether a graded completion is kept out of the loss: cut by the length limit, where so configured."""
    return config.loss.truncated == "mask" and completion.finish_reason is wire.FinishReason.LENGTH


def pack(
    sequences: list[Sequence], max_tokens: int, *, rank: int = 0, num_ranks: int = 1, multiple: int = 1
) -> list[MicroBatch]:
    """One rank's micro-batches of at most `max_tokens`, each longest first; the same for the same sequences.

    Sequences of one length stand side by side, so that attention can take them together. Every rank is given all
    sequences and has the same number of micro-batches, one of `multiple` (`learner.packing.plan`). One that would be
    empty, where there are too few sequences, holds the shortest sequence without counting it in the loss.

    Raises:
        ValueError: A sequence is longer than `max_tokens`.
    """
    lengths = np.array([s.num_tokens for s in sequences], dtype=np.int64)
    shared = plan(lengths, max_tokens, num_ranks, multiple)[rank]
    return [
        _micro_batch([sequences[i] for i in members] or [sequences[lengths.argmin()]], counted=len(members) > 0)
        for members in shared
    ]


def split_long(sequences: list[Sequence], max_tokens: int) -> tuple[list[Sequence], int]:
    """The sequences that fit a micro-batch, and how many do not."""
    fitting = [s for s in sequences if s.num_tokens <= max_tokens]
    return fitting, len(sequences) - len(fitting)


def _routed_experts(completion: wire.Completion, num_tokens: int) -> np.ndarray | None:
    """One row a token. The last, which the engine never saw and none attends to, is sent where the one before is."""
    if not completion.routed_experts:
        return None
    rows = np.frombuffer(completion.routed_experts, np.uint8).reshape(num_tokens - 1, -1)
    return np.concatenate([rows, rows[-1:]])


def _micro_batch(packed: list[Sequence], *, counted: bool) -> MicroBatch:
    lengths = np.array([s.num_tokens for s in packed])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    owner = np.repeat(np.arange(len(packed)), lengths)
    positions = np.arange(starts[-1]) - starts[owner]
    prompt_lengths = np.array([len(s.prompt) for s in packed])
    routes = [s.routed_experts for s in packed if s.routed_experts is not None]
    assert len(routes) in (0, len(packed)), "routed experts of some completions and not of others"
    response_mask = positions >= prompt_lengths[owner]
    logprobs = np.full(len(positions), np.nan, np.float32)
    logprobs[response_mask] = np.concatenate([s.generator_logprobs for s in packed])
    return MicroBatch(
        token_ids=torch.from_numpy(np.concatenate([part for s in packed for part in (s.prompt, s.response)])).long(),
        position_ids=torch.from_numpy(positions).long(),
        sequence_starts=torch.from_numpy(starts).int(),
        response_mask=torch.from_numpy(response_mask),
        sequence_of_token=torch.from_numpy(owner).long(),
        generator_logprobs=torch.from_numpy(logprobs),
        advantages=torch.tensor([s.advantage for s in packed], dtype=torch.float64),
        staleness=torch.tensor([s.staleness for s in packed]),
        loss_mask=torch.full((len(packed),), counted),
        routed_experts=torch.from_numpy(np.concatenate(routes)) if routes else None,
    )
