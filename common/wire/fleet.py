"""Who belongs to the run, what each does, and how the run stands."""

from typing import NamedTuple

import msgspec

from common.versions import Version
from common.wire.base import LeaseKey, Message, Role
from common.wire.training import Manifest

PROTOCOL = 3


class Hello(Message):
    """A process joins `run` (the run's public key). `endpoint` is where it listens, for a verifier; else empty.

    A process that says hello under a name that is taken has replaced the one before, whose leases are free again.
    """

    role: Role
    name: str
    run: str
    protocol: int = PROTOCOL
    endpoint: str = ""


class Welcome(Message):
    """The ledger knows the process from now on."""

    incarnation: int


class Span(NamedTuple):
    """An interval of wall-clock time, in seconds since the epoch."""

    start: float
    end: float


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
    num_tokens: int = 0
    num_items: int = 0
    gauges: dict[str, float] = msgspec.field(default_factory=dict)


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
    name: str
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
    next_s: float = 1.0


class Watch(Message):
    """Asks for the directory as soon as its revision is not `revision`."""

    revision: int


class Directory(Message):
    """What everyone may know.

    Attributes:
        revision: Changes with every change of the rest.
        manifest: Of the newest published version; None before the first.
        verifiers: Endpoints of the verifiers that are alive.
        closing: Whether the run ends: no new leases.
    """

    revision: int
    manifest: Manifest | None
    verifiers: tuple[str, ...]
    closing: bool


class Status(Message):
    """Asks how the run stands; `num_evaluations` are known already."""

    num_evaluations: int = 0


class Evaluation(Message):
    """The result of one evaluation on one set.

    Attributes:
        version: That it was asked for.
        source: Name of the held-out set.
        accuracy: Mean correctness over all samples: avg@k.
        pass_at_k: Share of prompts with at least one correct sample.
        num_prompts: In the set.
        num_samples: k.
        num_failed: Samples whose grading failed; in no mean.
        oldest: Oldest version that produced a token.
        newest: Newest version that produced a token.
    """

    version: Version
    source: str
    accuracy: float
    pass_at_k: float
    num_prompts: int
    num_samples: int
    num_failed: int
    oldest: Version
    newest: Version


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
    name: str
    seconds: float
    silent_s: float
    busy_share: float
    tokens_per_s: float
    items_per_s: float
    gauges: dict[str, float] = msgspec.field(default_factory=dict)


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
    """

    version: Version | None
    members: tuple[Member, ...]
    accounts: dict[str, int]
    epoch: float
    epochs: dict[str, float]
    filtered_right: int
    filtered_wrong: int
    evaluations: tuple[Evaluation, ...]
    overlap_share: float
    busy_shares: dict[str, float]
    waiting_for: str
