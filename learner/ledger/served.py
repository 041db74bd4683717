"""A stored group on its way to the learner: its bytes go as they are into the answer."""

import msgspec

from common import wire


class _Group(wire.Message, tag="TrainingGroup"):
    """`wire.TrainingGroup`, encoded already."""

    prompt: msgspec.Raw
    scored: msgspec.Raw
    has_expired: bool


class _Fetched(wire.Message, tag="Fetched"):
    """`wire.Fetched` with such a group."""

    group: _Group


def stored_group(prompt: bytes, scored: bytes, *, has_expired: bool) -> wire.Message:
    """The answer to a `wire.Fetch`, made of an encoded prompt and an encoded scored group."""
    return _Fetched(group=_Group(prompt=msgspec.Raw(prompt), scored=msgspec.Raw(scored), has_expired=has_expired))
