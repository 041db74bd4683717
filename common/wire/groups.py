"""Completions, their grades, and the groups that carry both."""

from enum import StrEnum
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from common.errors import WireError
from common.versions import Version
from common.wire.arrays import floats, int_bytes, ints
from common.wire.base import Duration, Finite, LeaseKey, Message, Name, Natural, Text


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Outcome(StrEnum):
    """What a verifier found. A failure (timeout, error) is masked from training and never reward 0."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TIMEOUT = "timeout"
    ERROR = "error"

    @property
    def graded(self) -> bool:
        """Whether the completion has a reward."""
        return self not in (Outcome.TIMEOUT, Outcome.ERROR)


class VersionSpan(NamedTuple):
    """A run of tokens sampled under one version; `end` is exclusive."""

    end: int
    version: Version


class Completion(Message):
    """One sampled answer.

    Attributes:
        token_ids: int32 bytes of the response, the stop token included where one ended it.
        logprobs: float32 bytes, what each token was sampled with (temperature applied), from the engine.
        versions: int32 bytes, triples (end, lineage, number) in order, the last end is the number of tokens.
        finish_reason: Why it ended.
        seed: Of its sampler.
        routed_experts: uint8 bytes, the experts that the engine sent each token of prompt and response but the last to
            (common/routes.py); from the forward passes that gave the logprobs. Empty unless the lease asks for them.
    """

    token_ids: bytes
    logprobs: bytes
    versions: bytes
    finish_reason: FinishReason
    seed: Natural
    routed_experts: bytes = b""

    @property
    def num_tokens(self) -> int:
        """Length of the response in tokens."""
        return len(self.token_ids) // 4

    def spans(self) -> list[VersionSpan]:
        """The version spans, in order."""
        return spans(self.versions)

    def check(self) -> None:
        """Checks what the types cannot say.

        Raises:
            WireError: The arrays do not fit together, or a logprob is not a finite number at most 0.
        """
        if len(self.token_ids) % 4 or len(self.versions) % 12 or not self.token_ids:
            sizes = f"{len(self.token_ids)} and {len(self.versions)} bytes"
            raise WireError(f"found arrays of {sizes}, expected int32 and int32 triples")
        if len(self.logprobs) != len(self.token_ids):
            raise WireError(f"found {len(self.logprobs) // 4} logprobs for {self.num_tokens} tokens, expected one each")
        logprobs = floats(self.logprobs)
        if not (logprobs.min() > -np.inf and logprobs.max() <= 1e-5):  # a NaN is neither
            raise WireError("found a logprob that is not a finite number at most 0")
        numbers = ints(self.versions).tolist()
        ends = numbers[::3]
        if ends[-1:] != [self.num_tokens] or ends[0] <= 0 or any(a >= b for a, b in pairwise(ends)):
            raise WireError(f"found version spans to {ends}, expected them to cover {self.num_tokens} tokens")
        if min(numbers) < 0 or ints(self.token_ids).min() < 0:
            raise WireError("found a negative token id or version, expected none")


class Grade(Message):
    """What a verifier says of one completion.

    Attributes:
        outcome: The kind of result.
        correct: The correctness reward, before penalties; uniform groups are judged by it.
        reward: The whole reward, penalties included. 0 and without meaning where the outcome is a failure.
        extracted: The answer that was found in the text, for people to read.
    """

    outcome: Outcome
    correct: Finite
    reward: Finite
    extracted: Text = ""


class Group(Message):
    """The completions of one prompt, on their way to a verifier.

    Attributes:
        key: The lease under which they were sampled.
        generator: Name of the process that sampled them.
        prompt_id: Of the prompt, for logs.
        answer: The reference answer.
        reward: Name of the reward.
        completions: `group_size` of them, fewer where late ones were left out; or the evaluation's number of samples.
        seconds: Wall-clock from lease to last token.
    """

    key: LeaseKey
    generator: Name
    prompt_id: Name
    answer: Text
    reward: Name
    completions: tuple[Completion, ...]
    seconds: Duration


class ScoredGroup(Message):
    """A group with a grade for each completion, in order."""

    group: Group
    grades: tuple[Grade, ...]
    verifier: Name


class Verdict(Message):
    """What the ledger made of a scored group. Each of the three ends the generator's keeping of it."""

    status: Literal["stored", "duplicate", "refused"]
    reason: Text = ""


def spans(data: bytes) -> list[VersionSpan]:
    """What `span_bytes` wrote."""
    numbers = iter(ints(data).tolist())
    return [VersionSpan(end, Version(*of)) for end, *of in zip(numbers, numbers, numbers, strict=True)]


def span_bytes(spans: list[VersionSpan]) -> bytes:
    """Version spans as int32 triples."""
    return int_bytes([number for span in spans for number in (span.end, *span.version)])
