"""The messages between processes: msgspec structs as msgpack, with per-token arrays as bytes.

Per-token arrays are little-endian: token ids int32, logprobs float32, version spans int32 triples. A group costs
8 bytes a token plus a small head; NumPy views of the bytes are free. Nothing here is ever unpickled.

A request and its answer:

    from         to         request        answer
    anyone       ledger     Hello          Welcome
    anyone       ledger     Beat           BeatAnswer
    anyone       ledger     Watch          Directory      (held until something changes)
    generator    ledger     LeaseRequest   Leases         (held until there is one)
    generator    verifier   RoomRequest    Room           (held until there is room)
    generator    verifier   Group          Verdict        (held until the ledger has stored it)
    verifier     ledger     ScoredGroup    Verdict
    learner      ledger     Begin          Begun
    learner      ledger     Reserve        Batch          (held until it is whole)
    learner      ledger     Commit         Done
    learner      ledger     Publish        Done
    learner      ledger     Checkpoint     Done
    learner      ledger     Evaluate       Done
    learner      ledger     Finish         Finished       (held until the final evaluation is in)
    anyone       ledger     Status         StatusReport
    anyone       anyone                    Refused        (the request is understood and refused, or is malformed)
"""

from enum import StrEnum
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.errors import WireError
from common.versions import Version

PROTOCOL = 1
MAX_MESSAGE_BYTES = 1 << 30


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Base of everything that travels."""


class Role(StrEnum):
    """What a process is."""

    LEDGER = "ledger"
    LEARNER = "learner"
    GENERATOR = "generator"
    VERIFIER = "verifier"
    LAUNCHER = "launcher"


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


class VisitState(StrEnum):
    """Where a prompt visit is; the last five are final (`trained` once its checkpoint is durable)."""

    WAITING = "waiting"
    LEASED = "leased"
    SCORED = "scored"
    RESERVED = "reserved"
    TRAINED = "trained"
    FILTERED = "filtered"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"
    UNUSED = "unused"


class LeaseKey(NamedTuple):
    """One attempt at one prompt visit: what fences a late result.

    An evaluation visit has a negative number; it is outside the training accounts.
    """

    visit: int
    attempt: int

    @property
    def is_evaluation(self) -> bool:
        """Whether this lease is of the evaluation kind."""
        return self.visit < 0


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
    """

    token_ids: bytes
    logprobs: bytes
    versions: bytes
    finish_reason: FinishReason
    seed: int

    @property
    def num_tokens(self) -> int:
        """Length of the response in tokens."""
        return len(self.token_ids) // 4

    def spans(self) -> list[VersionSpan]:
        """The version spans, in order."""
        return [VersionSpan(int(e), Version(int(lin), int(n))) for e, lin, n in ints(self.versions).reshape(-1, 3)]

    def check(self) -> None:
        """Checks what the types cannot say.

        Raises:
            WireError: The arrays do not fit together, or a logprob is not a finite number at most 0.
        """
        if len(self.token_ids) % 4 or len(self.versions) % 12 or not self.token_ids:
            raise WireError(
                f"found arrays of {len(self.token_ids)} and {len(self.versions)} bytes, expected int32 and int32 triples"
            )
        if len(self.logprobs) != len(self.token_ids):
            raise WireError(f"found {len(self.logprobs) // 4} logprobs for {self.num_tokens} tokens, expected one each")
        logprobs = floats(self.logprobs)
        if not (np.isfinite(logprobs).all() and (logprobs <= 1e-5).all()):
            raise WireError("found a logprob that is not a finite number at most 0")
        triples = ints(self.versions).reshape(-1, 3)
        ends = triples[:, 0]
        if not len(ends) or ends[-1] != self.num_tokens or ends[0] <= 0 or (np.diff(ends) <= 0).any():
            raise WireError(f"found version spans that end at {ends.tolist()}, expected them to cover {self.num_tokens}")
        if (triples[:, 1:] < 0).any() or (ints(self.token_ids) < 0).any():
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
    correct: float
    reward: float
    extracted: str = ""


class Group(Message):
    """The completions of one prompt, on their way to a verifier.

    Attributes:
        key: The lease under which they were sampled.
        generator: Name of the process that sampled them.
        prompt_id: Of the prompt, for logs.
        answer: The reference answer.
        reward: Name of the reward.
        completions: `group_size` of them, or the evaluation's number of samples.
        seconds: Wall-clock from lease to last token.
    """

    key: LeaseKey
    generator: str
    prompt_id: str
    answer: str
    reward: str
    completions: tuple[Completion, ...]
    seconds: float


class ScoredGroup(Message):
    """A group with a grade for each completion, in order."""

    group: Group
    grades: tuple[Grade, ...]
    verifier: str


class Verdict(Message):
    """What the ledger made of a scored group. Each of the three ends the generator's keeping of it."""

    status: str  # "stored", "duplicate" or "refused"
    reason: str = ""


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
    gauges: dict[str, float] = {}


class Beat(Message):
    """A sign of life, which renews the leases that the process still works on (or waits to hand over)."""

    role: Role
    name: str
    holds: tuple[LeaseKey, ...] = ()
    stats: Stats | None = None


class BeatAnswer(Message):
    """`cancelled` are held leases that are no longer wanted; `known` is false where the process must say hello again."""

    cancelled: tuple[LeaseKey, ...]
    known: bool


class Manifest(Message):
    """A published version: where its weights are and how to check an engine that loaded them.

    Attributes:
        version: Of the weights.
        path: Directory in Hugging Face format, on memory-backed storage.
        size_bytes: Of the weights.
        probe_token_ids: int32 bytes of one probe sequence.
        probe_logprobs: float32 bytes, the learner's logprob of each probe token after the first.
    """

    version: Version
    path: str
    size_bytes: int
    probe_token_ids: bytes
    probe_logprobs: bytes


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
        pinned_version: For an evaluation: the version the engine should keep until it is done.
    """

    key: LeaseKey
    prompt: Prompt
    num_completions: int
    sampling: Sampling
    seed: int
    pinned_version: Version | None = None


class Leases(Message):
    """Granted leases, oldest visit first; empty where the request timed out, with what the ledger waits for."""

    leases: tuple[Lease, ...]
    waiting_for: str = ""


class RoomRequest(Message):
    """A generator has `num_groups` to hand over."""

    num_groups: int


class Room(Message):
    """The verifier has room for `num_groups` from this peer, for a while."""

    num_groups: int


class Begin(Message):
    """The learner holds the weights of a checkpoint (or the starting ones: None) and is about to train."""

    checkpoint: Version | None


class Begun(Message):
    """The version under which the learner goes on (a new lineage after a resume), and all lineages so far."""

    version: Version
    branches: tuple[Version | None, ...]


class Reserve(Message):
    """The learner at `version` wants `num_groups` for its next step."""

    version: Version
    num_groups: int


class TrainingGroup(Message):
    """A scored group with its prompt."""

    prompt: Prompt
    scored: ScoredGroup


class Batch(Message):
    """The groups of a step, oldest first; empty where the request timed out, with what the ledger waits for."""

    version: Version
    groups: tuple[TrainingGroup, ...]
    waiting_for: str = ""


class Commit(Message):
    """The step from `version` is done: these visits are trained. Idempotent by version."""

    version: Version
    visits: tuple[int, ...]


class Publish(Message):
    """A version is ready to be pulled."""

    manifest: Manifest


class Checkpoint(Message):
    """The checkpoint of `version` is durable: what was trained up to it is final."""

    version: Version


class Evaluate(Message):
    """Asks for an evaluation of a published version on all held-out sets."""

    version: Version


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


class Finish(Message):
    """The learner is done: no new training leases, what is not trained is unused, and what is evaluated last counts."""

    reason: str


class Finished(Message):
    """Whether all evaluations are in, and the accounts: how many visits are in each state."""

    done: bool
    accounts: dict[str, int]
    waiting_for: str = ""


class Status(Message):
    """Asks how the run stands; `num_evaluations` are known already."""

    num_evaluations: int = 0


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
    gauges: dict[str, float] = {}


class StatusReport(Message):
    """How the run stands.

    Attributes:
        version: The learner's; None before it began.
        members: The processes that are alive.
        accounts: How many visits are in each state.
        evaluations: The finished ones after those that the asker knows.
        overlap_share: Of the time since the first step began: a generator's engine was busy while the learner stepped.
        busy_shares: Of the same time, by role: at least one process of the role had work.
        waiting_for: What the run waits for, in words; empty where it does not.
    """

    version: Version | None
    members: tuple[Member, ...]
    accounts: dict[str, int]
    evaluations: tuple[Evaluation, ...]
    overlap_share: float
    busy_shares: dict[str, float]
    waiting_for: str


class Done(Message):
    """It is done, or was done before."""


class Refused(Message):
    """The request is refused."""

    reason: str


Request: TypeAlias = (
    Hello
    | Beat
    | Watch
    | LeaseRequest
    | RoomRequest
    | Group
    | ScoredGroup
    | Begin
    | Reserve
    | Commit
    | Publish
    | Checkpoint
    | Evaluate
    | Finish
    | Status
)
Answer: TypeAlias = (
    Welcome | BeatAnswer | Directory | Leases | Room | Verdict | Begun | Batch | Done | Finished | StatusReport | Refused
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Request | Answer)


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Request | Answer:
    """The message in `data`, its completions checked.

    Raises:
        WireError: The bytes are no message of this protocol.
    """
    try:
        message = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"found {len(data)} bytes that are no message: {error}") from error
    group = message.group if isinstance(message, ScoredGroup) else message
    if isinstance(group, Group):
        for completion in group.completions:
            completion.check()
    return message


def ints(data: bytes) -> NDArray[np.int32]:
    """A read-only int32 view, shape [n]."""
    return np.frombuffer(data, dtype="<i4")


def floats(data: bytes) -> NDArray[np.float32]:
    """A read-only float32 view, shape [n]."""
    return np.frombuffer(data, dtype="<f4")


def int_bytes(values: "NDArray[np.int32] | list[int]") -> bytes:
    """Values as little-endian int32."""
    return np.asarray(values, dtype="<i4").tobytes()


def float_bytes(values: "NDArray[np.float32] | list[float]") -> bytes:
    """Values as little-endian float32."""
    return np.asarray(values, dtype="<f4").tobytes()


def span_bytes(spans: list[VersionSpan]) -> bytes:
    """Version spans as int32 triples."""
    return int_bytes([number for span in spans for number in (span.end, *span.version)])
