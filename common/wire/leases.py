"""Who may produce what: prompts, leases, and room at a verifier."""

from typing import NamedTuple

from common.errors import WireError
from common.versions import Version
from common.wire.arrays import ints
from common.wire.base import Count, Duration, LeaseKey, Message, Name, Natural, Share, Small, Text


class Prompt(Message):
    """One task.

    Attributes:
        id: Unique in the run: data set, line.
        source: Name of the data set it came from.
        token_ids: int32 bytes, the chat template applied.
        answer: The reference answer.
        reward: Name of the reward that grades it.
    """

    id: Name
    source: Name
    token_ids: bytes
    answer: Text
    reward: Name

    def check(self) -> None:
        """Checks what the types cannot say.

        Raises:
            WireError: There is no token, or one is negative.
        """
        if not self.token_ids or len(self.token_ids) % 4 or (ints(self.token_ids) < 0).any():
            raise WireError(f"found a prompt of {len(self.token_ids)} bytes, expected int32 token ids of at least 0")


class Sampling(Message):
    """How an engine samples. `top_k` = 0 considers all tokens; `temperature` = 0 is greedy."""

    temperature: Duration
    top_p: Share
    top_k: Small
    max_tokens: Count
    stop: tuple[Text, ...] = ()
    stop_token_ids: tuple[Small, ...] = ()


class LeaseRequest(Message):
    """A generator has room for up to `room` more groups; its engine holds `version`."""

    name: Name
    version: Version
    room: Small


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
    num_completions: Count
    sampling: Sampling
    seed: Natural
    deadline_s: Duration
    min_completions: Count
    pinned_version: Version | None = None
    routed_experts: bool = False


class Leases(Message):
    """Granted leases, oldest visit first; empty where the request timed out, with what the ledger waits for."""

    leases: tuple[Lease, ...]
    waiting_for: Text = ""


class Returned(NamedTuple):
    """A lease that a generator gives back, and why."""

    key: LeaseKey
    reason: Text


class GiveBack(Message):
    """A generator makes no group of these leases: their prompts are free at once, and their attempts count.

    Idempotent, and fenced: what another attempt or another generator has by now is left alone. One that `leaves` is
    about to end, and gets no lease any more.
    """

    name: Name
    leases: tuple[Returned, ...]
    leaves: bool = False


class RoomRequest(Message):
    """A generator has `num_groups` to hand over."""

    num_groups: Small


class Room(Message):
    """The verifier has room for `num_groups` from this peer, for a while."""

    num_groups: Small
