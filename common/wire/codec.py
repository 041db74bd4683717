"""Messages as bytes: which there are, and how they are read and written."""

from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from common.errors import WireError
from common.wire.base import Message, Text
from common.wire.fleet import Beat, BeatAnswer, Directory, Evaluation, Hello, Status, StatusReport, Watch, Welcome
from common.wire.groups import Completion, Group, ScoredGroup, Verdict
from common.wire.leases import GiveBack, LeaseRequest, Leases, Prompt, Room, RoomRequest
from common.wire.training import (
    Batch,
    Begin,
    Begun,
    Checkpoint,
    Commit,
    Committed,
    Done,
    Evaluate,
    Fetch,
    Fetched,
    Finish,
    Finished,
    Manifest,
    Publish,
    Reserve,
)
from common.wire.weights import Chunk, ChunkRequest, PartFiles, PartRequest

MAX_MESSAGE_BYTES = 1 << 30
_MAX_REASON = 300


class Refused(Message):
    """The request is refused."""

    reason: Text


_FromAnyone: TypeAlias = Hello | Beat | Watch | Status
_FromGenerator: TypeAlias = LeaseRequest | GiveBack | RoomRequest | Group
_FromLearner: TypeAlias = Begin | Reserve | Fetch | Commit | Publish | Checkpoint | Evaluate | Finish
_ToPublisher: TypeAlias = PartRequest | ChunkRequest
Request: TypeAlias = _FromAnyone | _FromGenerator | ScoredGroup | _FromLearner | _ToPublisher

_ToAnyone: TypeAlias = Welcome | BeatAnswer | Directory | StatusReport
_ToGenerator: TypeAlias = Leases | Room | Verdict
_ToLearner: TypeAlias = Begun | Batch | Fetched | Committed | Done | Finished
Answer: TypeAlias = _ToAnyone | _ToGenerator | _ToLearner | PartFiles | Chunk | Refused

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Request | Answer)


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Request | Answer:
    """The message in `data`, its arrays checked.

    Raises:
        WireError: The bytes are no message of this protocol.
    """
    try:
        message = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:_MAX_REASON]  # it may quote what was sent
        raise WireError(f"found {len(data)} bytes that are no message: {reason}") from error
    for part in _parts(message):
        part.check()
    return message


def _parts(message: Request | Answer) -> Iterator[Completion | Prompt | Manifest | Evaluation | PartFiles]:
    """What in a message has to be checked beyond its types."""
    match message:
        case Group():
            yield from message.completions
        case ScoredGroup():
            yield from message.group.completions
        case Fetched() if message.group is not None:
            yield message.group.prompt
            yield from message.group.scored.group.completions
        case Leases():
            yield from (lease.prompt for lease in message.leases)
        case Publish():
            yield message.manifest
        case Directory() if message.manifest is not None:
            yield message.manifest
        case PartFiles():
            yield message
        case StatusReport():
            yield from message.evaluations
        case _:
            return
