"""Visits: what the ledger knows of one turn of one prompt."""

from collections.abc import Callable, Container
from dataclasses import dataclass

import msgspec

from common.sections import LeaseConfig
from common.versions import Version
from common.wire import LeaseKey, VisitState

ENDED = (VisitState.FILTERED, VisitState.REJECTED, VisitState.QUARANTINED, VisitState.UNUSED)


@dataclass(slots=True, kw_only=True)
class Leasable:
    """Something that can be leased, and the lease that it is under.

    Attributes:
        number: Of the visit; negative for an evaluation.
        prompt: Row of the prompt in the store.
        attempt: How often it was leased; with the number, the fence of a result.
        holder: Name of the generator; empty where it is not leased.
        granted: The version that the generator's engine held: no token is older.
        granted_at: Wall-clock seconds since the epoch.
        heard_at: When the holder last named the lease in a beat. Not stored: a restart begins it anew.
        is_sampling: Whether completions are known to be missing. Not stored: after a restart none are until the
            holder is heard, so that a group which waits for a verifier is not taken for a late one.
    """

    number: int
    prompt: int
    attempt: int = 0
    holder: str = ""
    granted: Version | None = None
    granted_at: float = 0.0
    heard_at: float = 0.0
    is_sampling: bool = False

    @property
    def key(self) -> LeaseKey:
        """What fences the result of the newest attempt."""
        return LeaseKey(self.number, self.attempt)

    def lease(self, holder: str, version: Version, now: float) -> None:
        """Opens the next attempt."""
        self.attempt += 1
        self.holder, self.granted, self.granted_at, self.heard_at = holder, version, now, now
        self.is_sampling = True

    def is_held(self, key: LeaseKey, holder: str) -> bool:
        """Whether this is the holder's, and the newest attempt."""
        return self.key == key and self.holder == holder

    def renew(self, key: LeaseKey, holder: str, now: float, *, is_sampling: bool) -> bool:
        """Hears of a lease; returns whether it is the holder's newest here."""
        is_held = self.is_held(key, holder)
        if is_held:
            self.heard_at, self.is_sampling = now, is_sampling
        return is_held

    def lapse_reason(self, limits: LeaseConfig, now: float) -> str:
        """Why the lease is over; empty while it is not. Its heartbeat and its completions have clocks of their own.

        The generator itself ends what is late: that it did not, and yet beats, is known once its deadline is past by
        more than the time in which any news of it comes, which is the heartbeat's.
        """
        if now - self.heard_at > limits.heartbeat_timeout_s:
            return f"{self.holder} was silent for {limits.heartbeat_timeout_s:g} s"
        if self.is_sampling and now - self.granted_at > limits.completion_timeout_s + limits.heartbeat_timeout_s:
            return f"not complete after {limits.completion_timeout_s:g} s at {self.holder}, which did not give it back"
        return ""


def renew(
    find: Callable[[int], Leasable | None],
    holder: str,
    holds: tuple[LeaseKey, ...],
    now: float,
    finished: Container[LeaseKey],
) -> tuple[LeaseKey, ...]:
    """Hears of the leases that a generator holds; returns those that are over. `find` has what is leased, by number."""
    found = ((key, find(key.visit)) for key in holds)
    return tuple(
        key
        for key, leased in found
        if leased is None or not leased.renew(key, holder, now, is_sampling=key not in finished)
    )


@dataclass(slots=True, kw_only=True)
class Visit(Leasable):
    """One turn of a prompt in the order of the data.

    Attributes:
        state: Where it is.
        reason: Why it is there.
        pinned: Whether it has expired once: the learner waits for its next lease before it steps past the window.
        returned: Whether it went back because fewer than two of its completions were graded.
        versions: All that sampled a token of the stored group, each once.
        step: The version that reserved or trained it; of a scored one, before a resume undid that.
    """

    state: VisitState = VisitState.WAITING
    reason: str = ""
    pinned: bool = False
    returned: bool = False
    versions: tuple[Version, ...] = ()
    step: Version | None = None


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What the ledger knows beside the visits.

    Attributes:
        current: The learner's version; None before it began.
        branches: Of the lineages.
        commits_before: Commits of all lineages before each lineage began.
        checkpoints: Versions of the durable checkpoints on the path of the current version, oldest first.
        horizon: The oldest checkpoint that a resume may use; payloads of what it contains are freed.
        num_commits: Steps committed in all lineages.
        num_visits: Visits handed out.
        closing: Why the run ends; empty while it does not.
    """

    current: Version | None = None
    branches: tuple[Version | None, ...] = (None,)
    commits_before: tuple[int, ...] = (0,)
    checkpoints: tuple[Version, ...] = ()
    horizon: Version | None = None
    num_commits: int = 0
    num_visits: int = 0
    closing: str = ""


@dataclass(slots=True)
class Changes:
    """What a call to the ledger changed, to be stored as one.

    Attributes:
        head: The head after it; None where it is as before.
        visits: Those that changed, as they are now.
        payloads: Encoded scored groups to keep, by visit.
        freed: Visits whose payload is no longer needed.
    """

    head: Head | None
    visits: list[Visit]
    payloads: dict[int, bytes]
    freed: set[int]

    def __bool__(self) -> bool:
        """Whether there is anything to store."""
        return bool(self.head or self.visits or self.payloads or self.freed)
