"""What a learner rank and its publisher tell each other: lines of JSON over pipes."""

import msgspec

from common.versions import Version

WHOLE = ".safetensors"  # how the name of a version's file ends, after the version
PARTIAL = ".partial"  # how that of one ends that the learner rank still writes


class Encode(msgspec.Struct, frozen=True):
    """To the publisher: the part of this version is at `path`; the file is the publisher's from now on."""

    version: Version
    path: str


class Listening(msgspec.Struct, frozen=True, tag=True):
    """From the publisher: where it hands out."""

    endpoint: str


class Encoded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """From the publisher: a version can be pulled.

    Attributes:
        version: The version.
        is_anchor: Whether it can be pulled whole.
        delta_bytes: Size of what changed since the version before; 0 where there is no delta.
        full_bytes: Size of the part.
        num_changed: Elements that differ from the version before.
        num_elements: Elements of the part.
        seconds: How long encoding took.
    """

    version: Version
    is_anchor: bool
    delta_bytes: int
    full_bytes: int
    num_changed: int
    num_elements: int
    seconds: float
