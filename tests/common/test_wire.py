"""Messages: what goes in comes out, and what is no message is an error, never a crash."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, strategies as st

from common import wire
from common.errors import WireError
from common.versions import Version


def completion(tokens: list[int], ends: list[int] | None = None, **changes: object) -> wire.Completion:
    fields: dict[str, object] = {
        "token_ids": wire.int_bytes(tokens),
        "logprobs": wire.float_bytes([-0.5] * len(tokens)),
        "versions": wire.span_bytes(
            [wire.VersionSpan(end, Version(0, i)) for i, end in enumerate(ends or [len(tokens)])]
        ),
        "finish_reason": wire.FinishReason.STOP,
        "seed": 1,
    }
    return wire.Completion(**(fields | changes))  # type: ignore[arg-type]


def group(*completions: wire.Completion) -> wire.Group:
    return wire.Group(
        key=wire.LeaseKey(3, 1),
        generator="generator-0",
        prompt_id="a:1",
        answer="4",
        reward="math",
        completions=completions,
        seconds=0.5,
    )


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50), st.data())
def test_a_group_survives_the_wire(tokens: list[int], data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, len(tokens))))
    sent = group(completion(tokens, sorted(cuts | {len(tokens)})))
    received = wire.decode(wire.encode(sent))
    assert received == sent
    assert isinstance(received, wire.Group)
    assert wire.ints(received.completions[0].token_ids).tolist() == tokens
    assert [span.end for span in received.completions[0].spans()] == sorted(cuts | {len(tokens)})


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_an_error(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(data)


@given(st.data())
def test_a_damaged_message_is_an_error_or_another_message(data: st.DataObject) -> None:
    good = bytearray(wire.encode(group(completion([1, 2, 3]))))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(WireError):
        wire.decode(bytes(good))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": b""}, "expected int32"),
        ({"token_ids": b"abc"}, "expected int32"),
        ({"logprobs": wire.float_bytes([-0.5])}, "found 1 logprobs for 3 tokens"),
        ({"logprobs": wire.float_bytes([-0.5, float("nan"), -0.5])}, "not a finite number at most 0"),
        ({"logprobs": wire.float_bytes([-0.5, 0.5, -0.5])}, "not a finite number at most 0"),
        ({"versions": b""}, "expected them to cover 3"),
        ({"versions": wire.int_bytes([2, 0, 0])}, "expected them to cover 3"),
        ({"versions": wire.int_bytes([2, 0, 0, 1, 0, 1, 3, 0, 2])}, "expected them to cover 3"),
        ({"versions": wire.int_bytes([3, 0, -1])}, "negative"),
        ({"token_ids": wire.int_bytes([1, -2, 3])}, "negative"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(WireError, match=message):
        wire.decode(wire.encode(group(completion([1, 2, 3], **changes))))


def test_a_group_costs_eight_bytes_a_token_and_a_small_head() -> None:
    tokens = list(range(1000))
    size_bytes = len(wire.encode(group(*[completion(tokens)] * 16)))
    assert size_bytes / 16_000 < 8.1


def test_views_of_the_bytes_are_free_and_read_only() -> None:
    view = wire.ints(wire.int_bytes([1, 2]))
    assert view.dtype == np.dtype("<i4")
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 3
