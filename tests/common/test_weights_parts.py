"""Parts are safetensors files; what is none is said in one line."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from common.errors import WeightsError
from common.versions import Version
from common.weights.parts import Part, check_sums, part_header, part_sums, tensor_sum
from common.weights.work import num_threads
from tests.clocks import PATIENCE_S

VERSION = Version(0, 7)


def write(path: Path, head: dict[str, Any] | bytes, data: bytes) -> Path:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def two_tensors(path: Path) -> Path:
    header, _ = part_header([("a", "BF16", (2, 3)), ("b", "F32", (2,))])
    path.write_bytes(header + np.arange(2, dtype="<u4").tobytes() + np.arange(6, dtype="<u2").tobytes())
    return path


def test_safetensors_reads_a_part_and_a_part_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {
        "head.weight": torch.randn(5, 3).bfloat16(),
        "gate": torch.randn(3, 1),
        "scale": torch.tensor(-0.0),
        "none": torch.zeros(0, 4, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "theirs")
    with Part.open(tmp_path / "theirs") as part:
        header, entries = part_header([(e.name, e.dtype, e.shape) for e in part.entries.values()])
        (tmp_path / "ours").write_bytes(header + b"".join(part.bytes(entry.name).tobytes() for entry in entries))
        assert part.size_bytes == 15 * 2 + 3 * 4 + 4
        assert part.words("head.weight").tolist() == tensors["head.weight"].view(torch.uint16).flatten().tolist()
        assert part.words("gate").tolist() == tensors["gate"].view(torch.uint32).flatten().tolist()
    again = load_file(tmp_path / "ours")
    assert again.keys() == tensors.keys()
    assert all(
        again[name].dtype == tensor.dtype and again[name].shape == tensor.shape for name, tensor in tensors.items()
    )
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert Part.open(tmp_path / "ours").entries == {entry.name: entry for entry in entries}


def test_float32_lies_first_and_the_data_begins_at_a_whole_row() -> None:
    header, entries = part_header([("a", "BF16", (3,)), ("bb", "F32", (1,)), ("c", "BF16", ())])
    assert [(e.name, e.start, e.end) for e in entries] == [("bb", 0, 4), ("a", 4, 10), ("c", 10, 12)]
    assert len(header) % 8 == 0


def test_what_is_written_through_a_writable_part_is_in_the_file(tmp_path: Path) -> None:
    path = two_tensors(tmp_path / "part")
    with Part.open(path, writable=True) as part:
        part.words("a")[1] = 0xBEEF
    kept = Part.open(path).words("a")
    assert kept.tolist() == [0, 0xBEEF, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 1


GOOD = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("head", "data", "said"),
    [
        ({"a": GOOD}, b"123", "found 3 bytes of data, expected 4"),
        ({"a": GOOD}, b"12345", "found 5 bytes of data, expected 4"),
        ({"a": GOOD | {"data_offsets": [2, 6]}}, b"123456", "tensor a: found bytes (2, 6), expected (0, 4)"),
        ({"a": GOOD, "b": GOOD}, b"1234", "tensor b: found bytes (0, 4), expected (4, 8)"),
        ({"a": GOOD | {"shape": [3]}}, b"1234", "tensor a: found bytes (0, 4), expected (0, 6)"),
        ({"a": GOOD | {"shape": [-1, -2]}}, b"1234", "found no safetensors header of BF16 and F32 tensors"),
        ({"a": GOOD | {"dtype": "F16"}}, b"1234", "found no safetensors header of BF16 and F32 tensors"),
        (b'{"a":', b"", "found no safetensors header of BF16 and F32 tensors"),
    ],
)
def test_what_is_no_part_is_said(tmp_path: Path, head: dict[str, Any] | bytes, data: bytes, said: str) -> None:
    with pytest.raises(WeightsError) as caught:
        Part.open(write(tmp_path / "part", head, data))
    assert said in str(caught.value)
    assert str(tmp_path / "part") in str(caught.value)


def test_files_that_are_absent_empty_or_cut_are_no_parts(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read: No such file"):
        Part.open(tmp_path / "absent")
    (tmp_path / "empty").touch()
    with pytest.raises(WeightsError, match="found an empty file"):
        Part.open(tmp_path / "empty")
    whole = two_tensors(tmp_path / "part").read_bytes()
    for size in range(1, len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(WeightsError):
            Part.open(tmp_path / "cut")


@settings(max_examples=300)
@given(st.binary(min_size=1, max_size=64), st.integers(0, 80))
def test_garbage_is_no_part(tmp_path_factory: pytest.TempPathFactory, garbage: bytes, size: int) -> None:
    path = tmp_path_factory.mktemp("garbage") / "part"
    for data in (garbage, size.to_bytes(8, "little") + garbage):
        path.write_bytes(data)
        with suppress(WeightsError):
            assert Part.open(path).size_bytes == 0


def test_checksums_find_a_bit_and_name_version_and_tensor(tmp_path: Path) -> None:
    with Part.open(two_tensors(tmp_path / "part"), writable=True) as part:
        sums = part_sums(part)
        assert sums == {name: tensor_sum(part.words(name)) for name in part.entries}
        check_sums(part, sums, VERSION)
        with pytest.raises(WeightsError, match=r"version 0\.7: tensor b is not in the checksums"):
            check_sums(part, {"a": sums["a"]}, VERSION)
        with pytest.raises(WeightsError, match=r"version 0\.7: tensor c is not in the part"):
            check_sums(part, sums | {"c": 1}, VERSION)
        part.words("a")[5] ^= 0x8000
        with pytest.raises(WeightsError, match=r"version 0\.7: tensor a: found checksum [0-9a-f]{16}, expected"):
            check_sums(part, sums, VERSION)


def test_the_checksum_is_xxh3_of_the_bytes() -> None:
    assert tensor_sum(np.zeros(0, np.uint16)) == 0x2D06800538D394C2  # xxHash's own test vector


def test_weights_are_handled_without_torch() -> None:
    code = "import sys, common.weights.delta; assert not {'torch', 'transformers', 'safetensors'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)


def test_publishers_of_one_node_share_a_quarter_of_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for ranks, threads in ((1, 16), (4, 4), (64, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert num_threads() == threads
