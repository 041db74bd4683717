"""Messages as bytes: which there are, and how they are read and written."""

from typing import TypeAlias

import msgspec

from common.errors import WireError
from common.wire.base import Message
from common.wire.fleet import Beat, BeatAnswer, Directory, Hello, Status, StatusReport, Watch, Welcome
from common.wire.groups import Group, ScoredGroup, Verdict
from common.wire.leases import GiveBack, LeaseRequest, Leases, Room, RoomRequest
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
    Publish,
    Reserve,
)

MAX_MESSAGE_BYTES = 1 << 30


class Refused(Message):
    """The request is refused."""

    reason: str


_FromAnyone: TypeAlias = Hello | Beat | Watch | Status
_FromGenerator: TypeAlias = LeaseRequest | GiveBack | RoomRequest | Group
_FromLearner: TypeAlias = Begin | Reserve | Fetch | Commit | Publish | Checkpoint | Evaluate | Finish
Request: TypeAlias = _FromAnyone | _FromGenerator | ScoredGroup | _FromLearner

_ToAnyone: TypeAlias = Welcome | BeatAnswer | Directory | StatusReport
_ToGenerator: TypeAlias = Leases | Room | Verdict
_ToLearner: TypeAlias = Begun | Batch | Fetched | Committed | Done | Finished
Answer: TypeAlias = _ToAnyone | _ToGenerator | _ToLearner | Refused

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
