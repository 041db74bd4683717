"""What the learner asks of the ledger."""

from enum import StrEnum

from common.versions import Version
from common.wire.base import Message
from common.wire.groups import ScoredGroup
from common.wire.leases import Prompt


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


class Begin(Message):
    """The learner holds the weights of a checkpoint (or the starting ones: None) and is about to train.

    `sequence` and `num_visits` are what `Committed` told of the commit that made them; 0 for the starting ones.
    """

    checkpoint: Version | None
    sequence: int = 0
    num_visits: int = 0


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
    """The visits of a step, most stale first; empty where the request timed out, with what the ledger waits for."""

    version: Version
    visits: tuple[int, ...]
    waiting_for: str = ""


class Fetch(Message):
    """Asks for one group of the batch of the step from `version`."""

    version: Version
    visit: int


class Fetched(Message):
    """The group; None where the ledger has lost it, and with it the batch: the learner reserves another."""

    group: TrainingGroup | None


class Commit(Message):
    """The step from `version` is done: these visits are trained. Idempotent by version."""

    version: Version
    visits: tuple[int, ...]


class Committed(Message):
    """The step is stored: what a checkpoint names.

    Attributes:
        sequence: Number of the commit in all lineages, from 1.
        num_visits: Visits handed out by then: the position in the data.
    """

    sequence: int
    num_visits: int


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


class Publish(Message):
    """A version is ready to be pulled."""

    manifest: Manifest


class Checkpoint(Message):
    """The checkpoint of `version` is durable: what was trained up to it is final."""

    version: Version


class Evaluate(Message):
    """Asks for an evaluation of a published version on all held-out sets."""

    version: Version


class Finish(Message):
    """The learner is done: no new training leases, what is not trained is unused, and what is evaluated last counts."""

    reason: str


class Finished(Message):
    """Whether all evaluations are in, and the accounts: how many visits are in each state."""

    done: bool
    accounts: dict[str, int]
    waiting_for: str = ""


class Done(Message):
    """It is done, or was done before."""
