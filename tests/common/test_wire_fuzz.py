"""Mutated messages, a million in `make test-full`: each is refused by a WireError, or is a message that makes sense."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest

from common import wire
from common.errors import WireError
from tests.common.corpus import MESSAGES
from tests.common.sense import nonsense

pytestmark = [pytest.mark.fuzz]

NUM_MUTATIONS = 100_000
TREES = [msgspec.msgpack.decode(wire.encode(message)) for message in MESSAGES]
BYTES = [wire.encode(message) for message in MESSAGES]
EXTREMES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        [],
        {},
        "",
        "\n",
        "a\nb",
        "\x00",
        "x" * 2000,
        b"",
        b"\x00" * 4,
        b"\xff" * 12,
        b"\x00\x00\xc0\x7f" * 3,
    ),
    *(0, -1, 1, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        -0.5,
        1e308,
        5e-324,
        [0, 0],
        [-1, -1],
        [1 << 40, 0],
        {"a\n": float("nan")},
    ),
)


def flip(rng: random.Random, data: bytes) -> bytes:
    """One to three bits."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        found[int(rng.random() * len(found))] ^= 1 << rng.getrandbits(3)
    return bytes(found)


def cut(rng: random.Random, data: bytes) -> bytes:
    """A part is missing."""
    start = int(rng.random() * len(data))
    return data[:start] + data[start + 1 + int(rng.random() * 8) :]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Some bytes more."""
    at = int(rng.random() * (len(data) + 1))
    return data[:at] + rng.randbytes(1 + int(rng.random() * 6)) + data[at:]


def splice(rng: random.Random, data: bytes) -> bytes:
    """The beginning of one and the end of another."""
    other = rng.choice(BYTES)
    return data[: int(rng.random() * len(data))] + other[int(rng.random() * len(other)) :]


def replace(rng: random.Random, data: bytes) -> bytes:
    """The same structure, with an extreme value or a part of another message in one place."""
    value = rng.choice(EXTREMES) if rng.random() < 0.8 else rng.choice(TREES)
    return msgspec.msgpack.encode(_replaced(rng, msgspec.msgpack.decode(data), value))


def _replaced(rng: random.Random, tree: Any, value: Any) -> Any:
    """Walks down to a place, and changes it there."""
    if not isinstance(tree, (list, dict)) or not tree or rng.random() < 0.1:
        return value
    key = rng.choice(list(tree)) if isinstance(tree, dict) else int(rng.random() * len(tree))
    tree[key] = _replaced(rng, tree[key], value)
    return tree


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (flip, cut, insert, splice, replace)


def test_the_corpus_has_every_type_and_makes_sense() -> None:
    assert {type(message) for message in MESSAGES} == set(get_args(wire.Request | wire.Answer))
    for message in MESSAGES:
        assert nonsense(message) == ""
        assert wire.encode(wire.decode(wire.encode(message))) == wire.encode(message)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 10))])
def test_mutated_messages_are_refused_or_make_sense(seed: int) -> None:
    rng = random.Random(seed)
    accepted: Counter[str] = Counter()
    longest = 0
    for _ in range(NUM_MUTATIONS):
        mutate = MUTATIONS[int(rng.random() * len(MUTATIONS))]
        data = mutate(rng, BYTES[int(rng.random() * len(BYTES))])
        try:
            message = wire.decode(data)
        except WireError as error:
            longest = max(longest, len(str(error)))
            continue
        accepted[mutate.__name__] += 1
        assert nonsense(message) == "", (data, message)
    assert longest < 500
    assert all(accepted[mutate.__name__] > NUM_MUTATIONS / 25_000 for mutate in MUTATIONS), accepted
