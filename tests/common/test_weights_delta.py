"""Deltas are exact, whole, and found out where they are not what was written."""

import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from common.errors import WeightsError
from common.versions import Version
from common.weights.delta import Delta, apply_delta, encode_delta
from common.weights.parts import GROUP_BYTES, WORDS, DType, Part, part_header, tensor_sum
from tests.clocks import PATIENCE_S

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


@settings(max_examples=300)
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
        assert report.num_changed == sum(where.size for where in differ.values())
        assert report.size_bytes == (at / "delta").stat().st_size
        apply_delta(base, delta, num_threads=num_threads)
        assert (at / "base").read_bytes() == (at / "new").read_bytes()


def two_versions(at: Path, num_words: int = 40) -> tuple[Part, Part, Path]:
    """Parts of two small versions of which a few words differ, and the delta between them."""
    random = np.random.default_rng(0)
    old: Tensors = {
        "layer.weight": ("BF16", (num_words,), random.integers(0, 1 << 16, num_words, dtype="<u2")),
        "norm": ("BF16", (3,), np.arange(3, dtype="<u2")),
        "gate": ("F32", (5,), np.arange(5, dtype="<u4")),
    }
    new = {name: (dtype, shape, words.copy()) for name, (dtype, shape, words) in old.items()}
    new["layer.weight"][2][::7] += 1
    new["layer.weight"][2][5] -= 700
    new["gate"][2][:] += 3
    base, then = write_part(at / "base", old), write_part(at / "new", new)
    encode_delta(base, then, at / "delta", base_version=BASE, version=NEXT)
    return base, then, at / "delta"


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    base, _, path = two_versions(tmp_path)
    before, whole = base.path.read_bytes(), path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped").write_bytes(flipped)
        (tmp_path / "part").write_bytes(before)
        with Part.open(tmp_path / "part", writable=True) as part, pytest.raises(WeightsError):
            apply_delta(part, Delta.open(tmp_path / "flipped"))


def patch_all(part: Part, path: Path) -> None:
    """As `apply_delta`, without the checksums of the tensors that result."""
    delta = Delta.open(path)
    for index in range(delta.num_blocks):
        delta.patch(part, index)


def test_any_flipped_bit_is_found_by_the_delta_s_own_checksums(tmp_path: Path) -> None:
    base, _, path = two_versions(tmp_path)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(WeightsError):
            patch_all(base, path)


def test_a_truncated_or_a_foreign_file_is_no_delta(tmp_path: Path) -> None:
    base, _, path = two_versions(tmp_path)
    whole = path.read_bytes()
    for data in [*(whole[:size] for size in range(len(whole))), whole + b"\0", base.path.read_bytes()]:
        path.write_bytes(data)
        with pytest.raises(WeightsError) as caught:
            Delta.open(path)
        assert str(caught.value).startswith(f"{path}: found ")
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="absent: cannot be read: No such file"):
        Delta.open(tmp_path / "absent")


def test_a_delta_of_another_format_is_refused(tmp_path: Path) -> None:
    _, _, path = two_versions(tmp_path)
    data = bytearray(path.read_bytes())
    data[8] += 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="delta: found a delta of format 3, expected 2"):
        Delta.open(path)


def test_a_wrong_base_is_found_by_the_checksums(tmp_path: Path) -> None:
    base, _, path = two_versions(tmp_path)
    base.words("norm")[1] ^= 1
    with pytest.raises(WeightsError, match=r"base: version 0\.7: tensor norm: found checksum [0-9a-f]{16}, expected"):
        apply_delta(base, Delta.open(path))


def test_other_tensors_are_refused_before_anything_is_patched(tmp_path: Path) -> None:
    _, new, path = two_versions(tmp_path)
    other = write_part(tmp_path / "other", {"norm": ("BF16", (3,), np.arange(3, dtype="<u2"))})
    before = other.path.read_bytes()
    with pytest.raises(WeightsError, match=r"other: version 0\.7: found other tensors than"):
        apply_delta(other, Delta.open(path))
    assert other.path.read_bytes() == before
    with pytest.raises(WeightsError, match=r"new: version 0\.7: found other tensors than .*other of 0\.6 has"):
        encode_delta(other, new, tmp_path / "none", base_version=BASE, version=NEXT)
    assert not (tmp_path / "none").exists()


def test_a_delta_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    base, new, path = two_versions(tmp_path, 40_000)
    before, files = path.read_bytes(), sorted(tmp_path.iterdir())
    code = f"""
        import resource
        from pathlib import Path
        from common.errors import exit_on_error
        from common.versions import Version
        from common.weights.delta import encode_delta
        from common.weights.parts import Part
        base, new = Part.open(Path({str(base.path)!r})), Part.open(Path({str(new.path)!r}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, -1))
        with exit_on_error():
            encode_delta(base, new, Path({str(path)!r}), base_version=Version(0, 6), version=Version(0, 7))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    assert done.stderr == f"sluice: {path}: cannot be written: File too large\n"
    assert sorted(tmp_path.iterdir()) == files
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.09, 0.3, 0.9])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_tensors_of_several_blocks_and_blocks_of_several_tensors(
    tmp_path: Path, dtype: DType, share: float, num_threads: int
) -> None:
    random, word = np.random.default_rng(1), WORDS[dtype]
    sizes = [3, (GROUP_BYTES // word.itemsize) * 2 + 5, 1, 1000, 0, 77, GROUP_BYTES // word.itemsize, 8]
    old = {f"t{i}": random.integers(0, 1 << 15, n, dtype=word) for i, n in enumerate(sizes)}
    new = {n: w + (random.random(w.size) < share) * random.integers(1, 40, w.size, dtype=word) for n, w in old.items()}
    parts = [
        write_part(tmp_path / name, {n: (dtype, (w.size,), w) for n, w in tensors.items()})
        for name, tensors in (("base", old), ("new", new))
    ]
    report = encode_delta(*parts, tmp_path / "delta", base_version=BASE, version=NEXT, num_threads=num_threads)
    assert report.num_changed == sum(np.count_nonzero(old[n] != new[n]) for n in old)
    apply_delta(parts[0], Delta.open(tmp_path / "delta"), num_threads=num_threads)
    assert parts[0].path.read_bytes() == parts[1].path.read_bytes()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_noise_costs_a_hair_more_than_in_full_and_memory_is_bounded(tmp_path: Path, dtype: DType) -> None:
    size = WORDS[dtype].itemsize
    num_words = (32 << 20) // size
    parts = [
        write_part(
            tmp_path / f"{seed}",
            {
                "t": (
                    dtype,
                    (num_words,),
                    np.random.default_rng(seed).integers(0, 256**size, num_words, WORDS[dtype]),
                )
            },
        )
        for seed in (0, 1)
    ]
    tracemalloc.start()
    try:
        report = encode_delta(*parts, tmp_path / "delta", base_version=BASE, version=NEXT)
        encoding = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        apply_delta(parts[0], Delta.open(tmp_path / "delta"))
        applying = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.size_bytes < 1.001 * report.full_bytes
    assert encoding < 12 * GROUP_BYTES
    assert applying < 12 * GROUP_BYTES
