"""What the learner asks of the ledger."""

from enum import StrEnum

import numpy as np

from common.errors import WireError
from common.versions import Version
from common.wire.arrays import floats, ints
from common.wire.base import Message, Name, Natural, Small, Text
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
    sequence: Natural = 0
    num_visits: Natural = 0


class Begun(Message):
    """The version under which the learner goes on (a new lineage after a resume), and all lineages so far."""

    version: Version
    branches: tuple[Version | None, ...]


class Reserve(Message):
    """The learner at `version` wants `num_groups` for its next step."""

    version: Version
    num_groups: Small


class TrainingGroup(Message):
    """A scored group with its prompt, and whether an attempt at it before has become too stale."""

    prompt: Prompt
    scored: ScoredGroup
    has_expired: bool = False


class Batch(Message):
    """The visits of a step, most stale first; empty where the request timed out, with what the ledger waits for."""

    version: Version
    visits: tuple[Natural, ...]
    waiting_for: Text = ""


class Fetch(Message):
    """Asks for one group of the batch of the step from `version`."""

    version: Version
    visit: Natural


class Fetched(Message):
    """The group; None where the ledger has lost it, and with it the batch: the learner reserves another."""

    group: TrainingGroup | None


class Commit(Message):
    """The step from `version` is done: these visits are trained. Idempotent by version."""

    version: Version
    visits: tuple[Natural, ...]


class Committed(Message):
    """The step is stored: what a checkpoint names.

    Attributes:
        sequence: Number of the commit in all lineages, from 1.
        num_visits: Visits handed out by then: the position in the data.
    """

    sequence: Natural
    num_visits: Natural


class Manifest(Message):
    """A published version: who hands it out, and how to check an engine that loaded it.

    Attributes:
        version: The version of the weights.
        publishers: Where each part can be pulled.
        size_bytes: Size of the whole weights.
        probe_token_ids: int32 bytes of one probe sequence.
        probe_logprobs: float32 bytes, the learner's logprob of each probe token after the first.
    """

    version: Version
    publishers: tuple[Name, ...]
    size_bytes: Natural
    probe_token_ids: bytes
    probe_logprobs: bytes

    def check(self) -> None:
        """Checks what the types cannot say.

        Raises:
            WireError: The arrays do not fit together, a token is negative, or a logprob is no finite number.
        """
        sizes = len(self.probe_token_ids), len(self.probe_logprobs)
        if sizes[0] % 4 or sizes[1] != max(0, sizes[0] - 4):
            raise WireError(f"found probes of {sizes[0]} and {sizes[1]} bytes, expected a logprob for all but one")
        if (ints(self.probe_token_ids) < 0).any() or not np.isfinite(floats(self.probe_logprobs)).all():
            raise WireError("found a negative probe token or a logprob that is not finite, expected none")


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

    reason: Text


class Finished(Message):
    """Whether all evaluations are in, and the accounts: how many visits are in each state."""

    done: bool
    accounts: dict[Name, Natural]
    waiting_for: Text = ""


class Done(Message):
    """It is done, or was done before."""
