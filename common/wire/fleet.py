"""Who belongs to the run, what each does, and how the run stands."""

import math
import time
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from common.errors import WireError
from common.versions import Version
from common.wire.base import Duration, Finite, LeaseKey, Line, Message, Name, Natural, Role, Small, Text
from common.wire.training import Manifest

PROTOCOL = 4

Revision = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Hello(Message):
    """A process joins `run` (the run's public key). `endpoint` is where it listens, for a verifier; else empty.

    A process that says hello under a name that is taken has replaced the one before, whose leases are free again; one
    that started before the holder of the name, in seconds since the epoch, has not.
    """

    role: Role
    name: Name
    run: Name
    protocol: Small = PROTOCOL
    endpoint: Line = ""
    started_at: Duration = msgspec.field(default_factory=time.time)


class Welcome(Message):
    """The ledger knows the process from now on."""

    incarnation: Natural


class Span(NamedTuple):
    """An interval of wall-clock time, in seconds since the epoch."""

    start: Finite
    end: Finite


class Stats(Message):
    """What a process did since its last beat, for people and for metrics.

    Attributes:
        interval: The time it speaks of.
        busy: The parts of it in which the process (a generator: its engine) had work.
        num_tokens: Sampled, graded or trained.
        num_items: Completions sampled or graded, or steps.
        gauges: Further numbers by name.
    """

    interval: Span
    busy: tuple[Span, ...] = ()
    num_tokens: Natural = 0
    num_items: Natural = 0
    gauges: dict[Name, Finite] = msgspec.field(default_factory=dict)


class Beat(Message):
    """A sign of life, which renews the leases that the process still works on (or waits to hand over).

    Attributes:
        role: What it is.
        name: Which it is.
        holds: Those leases.
        finished: Those of them whose completions are all there: they wait for a verifier, or for its verdict.
        stats: What it did since its last beat.
    """

    role: Role
    name: Name
    holds: tuple[LeaseKey, ...] = ()
    finished: tuple[LeaseKey, ...] = ()
    stats: Stats | None = None


class BeatAnswer(Message):
    """What a process hears of itself.

    Attributes:
        cancelled: Leases that are no longer wanted.
        known: Whether the ledger knows the process; else it must say hello again.
        next_s: When the next beat is due: the larger the fleet, the later.
    """

    cancelled: tuple[LeaseKey, ...]
    known: bool
    next_s: Duration = 1.0


class Watch(Message):
    """Asks for the directory as soon as its revision is not `revision`."""

    revision: Revision


class Directory(Message):
    """What everyone may know.

    Attributes:
        revision: Changes with every change of the rest.
        manifest: Of the newest published version; None before the first.
        verifiers: Endpoints of the verifiers that are alive.
        closing: Whether the run ends: no new leases.
    """

    revision: Revision
    manifest: Manifest | None
    verifiers: tuple[Name, ...]
    closing: bool


class Status(Message):
    """Asks how the run stands; `num_evaluations` are known already."""

    num_evaluations: Natural = 0


class Evaluation(Message):
    """The result of one evaluation on one set.

    Attributes:
        version: That it was asked for.
        source: Name of the held-out set.
        accuracy: Mean correctness over all samples: avg@k. NaN where none was graded.
        pass_at_k: Share of prompts with at least one correct sample. NaN where none was graded.
        num_prompts: In the set.
        num_samples: k.
        num_failed: Samples whose grading failed; in no mean.
        oldest: Oldest version that produced a token.
        newest: Newest version that produced a token.
    """

    version: Version
    source: Name
    accuracy: float
    pass_at_k: float
    num_prompts: Natural
    num_samples: Natural
    num_failed: Natural
    oldest: Version
    newest: Version

    def check(self) -> None:
        """Checks what the types cannot say.

        Raises:
            WireError: A mean is infinite.
        """
        if math.isinf(self.accuracy) or math.isinf(self.pass_at_k):
            raise WireError(f"found an accuracy of {self.accuracy}, pass@k of {self.pass_at_k}, expected finite ones")


class Member(Message):
    """A process that the ledger knows, over the last minute of its life.

    Attributes:
        role: What it is.
        name: Which it is.
        seconds: Since it said hello.
        silent_s: Since it was last heard.
        busy_share: Of the time that it reported.
        tokens_per_s: Sampled, graded or trained.
        items_per_s: Completions sampled or graded, or steps.
        gauges: The newest.
    """

    role: Role
    name: Name
    seconds: Finite
    silent_s: Finite
    busy_share: Finite
    tokens_per_s: Finite
    items_per_s: Finite
    gauges: dict[Name, Finite] = msgspec.field(default_factory=dict)


class StatusReport(Message):
    """How the run stands.

    Attributes:
        version: The learner's; None before it began.
        members: The processes that are alive.
        accounts: How many visits are in each state.
        epoch: Visits handed out, in prompts to train on.
        epochs: The same of each file of `data.train`, by its name; right to one visit.
        filtered_right: Of the filtered ones, those whose completions are all right.
        filtered_wrong: Those whose completions are all wrong.
        evaluations: The finished ones after those that the asker knows.
        overlap_share: Of the time since the first step began: a generator's engine was busy while the learner stepped.
        busy_shares: Of the same time, by role: at least one process of the role had work.
        waiting_for: What the run waits for, in words; empty where it does not.
        pin_wait_s: How long the newest batch was late for pinned visits alone.
        refused: What the ledger turned away since it started, by kind (common/refusals.py).
    """

    version: Version | None
    members: tuple[Member, ...]
    accounts: dict[Name, Natural]
    epoch: Duration
    epochs: dict[Name, Duration]
    filtered_right: Natural
    filtered_wrong: Natural
    evaluations: tuple[Evaluation, ...]
    overlap_share: Finite
    busy_shares: dict[Name, Finite]
    waiting_for: Text
    pin_wait_s: Duration
    refused: dict[Name, Natural]
