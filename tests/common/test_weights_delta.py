"""Deltas are exact, whole, and found out where they are not what was written."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from common.versions import Version
from common.weights.delta import Delta, apply_delta, encode_delta
from common.weights.parts import WORDS, DType, Part, part_header, tensor_sum

BASE, NEXT = Version(0, 6), Version(0, 7)
Tensors = dict[str, tuple[DType, tuple[int, ...], NDArray[np.generic]]]


def write_part(path: Path, tensors: Tensors) -> Part:
    """A part of these words."""
    header, entries = part_header([(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()])
    path.write_bytes(header + b"".join(tensors[entry.name][2].tobytes() for entry in entries))
    return Part.open(path, writable=True)


SPECIAL = {
    "BF16": [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0xFFFF, 0x7FFF, 0x0001, 0x8001],
    "F32": [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7FC00001, 0xFFFFFFFF, 0x7FFFFFFF, 1, 0x80000001],
}
shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    st.integers(0, 5000).map(lambda n: (n,)),
)


@st.composite
def versions(draw: st.DrawFn) -> tuple[Tensors, Tensors]:
    """The tensors of two versions, of which any share differs by anything."""
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    base: Tensors = {}
    new: Tensors = {}
    for i, shape in enumerate(draw(st.lists(shapes, max_size=6))):
        dtype: DType = draw(st.sampled_from(["BF16", "F32"]))
        word, size = WORDS[dtype], int(np.prod(shape, dtype=int))
        old = random.integers(0, 1 << (8 * word.itemsize), size, dtype=word)
        changed = random.random(size) < draw(st.sampled_from([0, 0.001, 0.02, 0.1, 0.5, 0.98, 1]))
        spread = draw(st.integers(1, 8 * word.itemsize))
        values = np.where(
            random.random(size) < 0.1,
            random.choice(np.array(SPECIAL[dtype], word), size),
            old + random.integers(0, 1 << spread, size, dtype=word) - word.type(1 << (spread - 1)),
        )
        base[f"t{i}"] = (dtype, shape, old)
        new[f"t{i}"] = (dtype, shape, np.where(changed, values, old).astype(word))
    return base, new


@settings(max_examples=300, deadline=None)
@given(versions(), st.integers(1, 2))
def test_a_delta_makes_the_new_version_bit_for_bit(both: tuple[Tensors, Tensors], num_threads: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        at = Path(name)
        base, new = write_part(at / "base", both[0]), write_part(at / "new", both[1])
        report = encode_delta(base, new, at / "delta", base_version=BASE, version=NEXT, num_threads=num_threads)
        delta = Delta.open(at / "delta")
        assert (delta.base_version, delta.version) == (BASE, NEXT)
        assert delta.sums == {name: tensor_sum(new.words(name)) for name in new.entries}
        differ = {n: np.flatnonzero(base.words(n) != new.words(n)) for n in new.entries}
        assert set(delta.names) == {n for n, where in differ.items() if where.size}
        assert report.num_changed == sum(where.size for where in differ.values())
        assert report.size_bytes == (at / "delta").stat().st_size
        for n in new.entries:
            positions, differences = delta.changes(n)
            assert positions.dtype == np.int64
            np.testing.assert_array_equal(positions, differ[n])
            np.testing.assert_array_equal(base.words(n)[positions] + differences, new.words(n)[positions])
        apply_delta(base, delta, num_threads=num_threads)
        assert (at / "base").read_bytes() == (at / "new").read_bytes()
