"""What goes through the pipes of a grading process: frames of a 4-byte little-endian length and msgpack."""

from typing import Final

import msgspec

HEAD_BYTES: Final = 4
MAX_ANSWER_BYTES: Final = 1 << 20


class Task(msgspec.Struct, frozen=True, array_like=True):
    """One completion to grade.

    Attributes:
        reward: Name of the reward.
        answer: The reference answer.
        text: The response, decoded.
    """

    reward: str
    answer: str
    text: str


class Ready(msgspec.Struct, frozen=True, array_like=True):
    """First frame of a grading process: it waits for tasks, and this is what it needs before the first."""

    address_space_bytes: int


def frame(message: object) -> bytes:
    """A message with its head."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(HEAD_BYTES, "little") + body
