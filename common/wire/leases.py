"""Who may produce what: prompts, leases, and room at a verifier."""

from typing import NamedTuple

from common.versions import Version
from common.wire.base import LeaseKey, Message


class Prompt(Message):
    """One task.

    Attributes:
        id: Unique in the run: data set, line.
        source: Name of the data set it came from.
        token_ids: int32 bytes, the chat template applied.
        answer: The reference answer.
        reward: Name of the reward that grades it.
    """

    id: str
    source: str
    token_ids: bytes
    answer: str
    reward: str


class Sampling(Message):
    """How an engine samples. `top_k` = 0 considers all tokens; `temperature` = 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


class LeaseRequest(Message):
    """A generator has room for up to `room` more groups; its engine holds `version`."""

    name: str
    version: Version
    room: int


class Lease(Message):
    """Permission to produce one group.

    Attributes:
        key: Fences its result.
        prompt: What to complete.
        num_completions: How many.
        sampling: How.
        seed: Completion i samples with seed + i.
        deadline_s: How long each completion may take from when the generator gets the lease; then it is late.
        min_completions: How many must have ended by then: the others are left out. Of fewer there is no group.
        pinned_version: For an evaluation: the version the engine should keep until it is done.
        routed_experts: Whether the completions carry them.
    """

    key: LeaseKey
    prompt: Prompt
    num_completions: int
    sampling: Sampling
    seed: int
    deadline_s: float
    min_completions: int
    pinned_version: Version | None = None
    routed_experts: bool = False


class Leases(Message):
    """Granted leases, oldest visit first; empty where the request timed out, with what the ledger waits for."""

    leases: tuple[Lease, ...]
    waiting_for: str = ""


class Returned(NamedTuple):
    """A lease that a generator gives back, and why."""

    key: LeaseKey
    reason: str


class GiveBack(Message):
    """A generator makes no group of these leases: their prompts are free at once, and their attempts count.

    Idempotent, and fenced: what another attempt or another generator has by now is left alone. One that `leaves` is
    about to end, and gets no lease any more.
    """

    name: str
    leases: tuple[Returned, ...]
    leaves: bool = False


class RoomRequest(Message):
    """A generator has `num_groups` to hand over."""

    num_groups: int


class Room(Message):
    """The verifier has room for `num_groups` from this peer, for a while."""

    num_groups: int
