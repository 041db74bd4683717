"""Which versions can be pulled, by what files, and what is kept for them."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from common import wire
from common.errors import RefusedError
from common.versions import Version
from common.weights.delta import Delta, apply_delta
from common.weights.parts import Part
from learner.publisher.chain import Chain, Stored
from tests.learner.test_checkpoints import limited_files
from tests.publishing import Tensors, changed, write_part

START = {"a": np.random.default_rng(0).normal(size=20_000).astype(np.float32), "b": np.arange(30_000, dtype=np.uint16)}


class Publishing:
    """A chain, and what each of its versions is."""

    def __init__(self, directory: Path, anchor_every: int = 4, retention: float = 3.0) -> None:
        self.directory = directory
        self.chain = Chain(directory, 0, anchor_every=anchor_every, retention=retention, num_threads=1)
        self.versions: list[Tensors] = []

    def add(self, tensors: Tensors | None = None, busy: Collection[wire.FileKey] = ()) -> list[Stored]:
        number = len(self.versions)
        self.versions.append(tensors or (changed(self.versions[-1], number) if number else START))
        path = write_part(self.directory / f"{Version(0, number)}.safetensors", self.versions[-1])
        return self.chain.add(self.chain.encode(Version(0, number), path), busy)

    def kinds(self, number: int, have: int | None = None) -> list[str]:
        files = self.chain.files(Version(0, number), None if have is None else Version(0, have))
        return [f"{file.content.key.version.number}{'w' if file.content.key.base is None else ''}" for file in files]

    def rebuilt(self, number: int, scratch: Path) -> bool:
        """Whether the files of a version make it."""
        whole, *deltas = self.chain.files(Version(0, number), None)
        scratch.write_bytes(whole.path.read_bytes())
        with Part.open(scratch, writable=True) as part:
            for delta in deltas:
                apply_delta(part, Delta.open(delta.path))
            return all(part.words(n).tobytes() == t.tobytes() for n, t in self.versions[number].items())


def test_a_joiner_takes_the_anchor_and_the_deltas_after_it_and_a_follower_the_deltas(tmp_path: Path) -> None:
    publishing = Publishing(tmp_path)
    for _ in range(7):
        publishing.add()
    assert publishing.kinds(6) == ["4w", "5", "6"]
    assert publishing.kinds(6, have=5) == ["6"]
    assert publishing.kinds(6, have=2) == ["3", "4", "5", "6"]
    assert publishing.kinds(6, have=6) == []
    assert publishing.kinds(3) == ["0w", "1", "2", "3"]
    assert all(publishing.rebuilt(number, tmp_path / "scratch") for number in range(7))


def test_no_more_is_kept_than_the_retention_and_what_joiners_need_stays(tmp_path: Path) -> None:
    publishing = Publishing(tmp_path)
    full_bytes = sum(tensor.nbytes for tensor in START.values())
    for number in range(14):
        publishing.add()
        left = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        assert sum(left.values()) - left[f"0.{number}.safetensors"] <= 3.0 * full_bytes
    wholes = sorted(name for name in left if name.endswith(".safetensors"))
    assert wholes == ["0.12.safetensors", "0.13.safetensors", "0.8.safetensors"]  # 4 is gone, 13 is the newest
    assert "part-00000.0.9.from-0.8" in left
    assert publishing.kinds(13) == ["12w", "13"]
    assert publishing.kinds(13, have=8) == ["9", "10", "11", "12", "13"]


def test_where_deltas_are_large_every_version_is_an_anchor_and_followers_still_take_deltas(tmp_path: Path) -> None:
    publishing = Publishing(tmp_path, retention=2.0)
    publishing.add()
    for number in range(1, 6):
        publishing.add(changed(publishing.versions[-1], number, share=0.5))
    assert publishing.kinds(5) == ["5w"]
    assert publishing.kinds(5, have=4) == ["5"]
    assert publishing.rebuilt(5, tmp_path / "scratch")


def test_anchors_that_are_pulled_go_last_and_the_oldest_of_them_the_very_last(tmp_path: Path) -> None:
    publishing = Publishing(tmp_path, retention=2.5)
    busy = {wire.FileKey(0, Version(0, 0), None)}
    publishing.add()
    for number in range(1, 7):
        publishing.add(changed(publishing.versions[-1], number, share=0.3), busy)
        assert publishing.kinds(0) == ["0w"]
        assert publishing.kinds(number, have=number - 1) == [f"{number}"]  # nobody else suffers from it
        busy |= {file.content.key for file in publishing.chain.files(Version(0, number), None)}
    for _ in range(2):
        publishing.add(changed(publishing.versions[-1], 9, share=0.3))
    with pytest.raises(RefusedError, match=r"found version 0\.8 published, expected 0\.0"):
        publishing.kinds(0)


def test_one_who_has_what_is_gone_takes_an_anchor_and_what_is_gone_is_refused(tmp_path: Path) -> None:
    publishing = Publishing(tmp_path, retention=2.1)
    for _ in range(10):
        publishing.add()
    assert publishing.kinds(9, have=3) == ["8w", "9"]
    for number in (3, 12):
        with pytest.raises(RefusedError, match=f"part 0: found version 0.9 published, expected 0.{number}$"):
            publishing.chain.files(Version(0, number), None)


def test_a_delta_that_is_nearly_as_large_as_the_part_makes_an_anchor(tmp_path: Path) -> None:
    publishing = Publishing(tmp_path)
    publishing.add()
    publishing.add()
    random = np.random.default_rng(1)
    publishing.add(
        {"a": random.normal(size=20_000).astype(np.float32), "b": random.integers(0, 9999, 30_000, np.uint16)}
    )
    publishing.add()
    assert publishing.kinds(3, have=1) == ["2w", "3"]
    assert publishing.kinds(1) == ["0w", "1"]
    assert all(publishing.rebuilt(number, tmp_path / "scratch") for number in range(4))


def test_a_version_without_room_for_its_delta_is_an_anchor(tmp_path: Path) -> None:
    publishing = Publishing(tmp_path)
    publishing.add()
    tensors = changed(START, 1)
    path = write_part(tmp_path / "0.1.safetensors", tensors)
    publishing.versions.append(tensors)
    with limited_files(1_000):
        new = publishing.chain.encode(Version(0, 1), path)
    publishing.chain.add(new)
    assert publishing.kinds(1, have=0) == ["1w"]
    assert publishing.rebuilt(1, tmp_path / "scratch")
    publishing.add()
    assert publishing.kinds(2, have=1) == ["2"]


def test_what_a_killed_publisher_left_is_removed_but_not_what_the_learner_writes(tmp_path: Path) -> None:
    for name in (
        "0.3.safetensors",
        "part-00000.0.3.from-0.2",
        ".part-00000.0.4.from-0.3.17",
        "0.5.safetensors",  # written since by the learner
        ".0.6.safetensors.partial",
    ):
        (tmp_path / name).write_bytes(b"left")
    chain = Chain(tmp_path, 0, anchor_every=4, retention=3.0, num_threads=1)
    chain.add(chain.encode(Version(0, 4), write_part(tmp_path / "0.4.safetensors", START)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".0.6.safetensors.partial",
        "0.4.safetensors",
        "0.5.safetensors",
    ]
