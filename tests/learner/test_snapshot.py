"""A rank's weights as a part: whole or absent, and every tensor is taken whatever fails."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.snapshot import PartWriter
from tests.learner.test_checkpoints import limited_files

WEIGHTS = {
    "embedding": torch.randn(7, 3).bfloat16(),
    "norm": torch.randn(5),
    "scalar": torch.tensor(-0.0),
    "head": torch.randn(300, 200).bfloat16(),
}


def export() -> Iterator[tuple[str, torch.Tensor]]:
    yield from WEIGHTS.items()


def test_a_part_has_every_tensor_bit_for_bit_version_after_version(tmp_path: Path) -> None:
    writer = PartWriter()
    assert writer.write(export, tmp_path / "new" / "0.0.safetensors") == ""
    moved = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    assert writer.write(moved.items, tmp_path / "new" / "0.1.safetensors") == ""
    for name, expected in (("0.0", WEIGHTS), ("0.1", moved)):
        found = load_file(tmp_path / "new" / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert writer.size_bytes == sum(tensor.nbytes for tensor in WEIGHTS.values())


def test_views_of_parameters_and_gradients_are_written_as_they_are(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(6, 4))
    PartWriter().write(lambda: [("t", parameter.T[1:3])], tmp_path / "part")
    assert torch.equal(load_file(tmp_path / "part")["t"], parameter.detach().T[1:3])


def test_a_full_disk_is_one_line_and_leaves_nothing_and_all_tensors_are_taken(tmp_path: Path) -> None:
    taken: list[str] = []

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in WEIGHTS.items():
            taken.append(name)
            yield name, tensor

    writer = PartWriter()
    with limited_files(50_000):
        error = writer.write(counted, tmp_path / "part")
    assert error.startswith(f"{tmp_path / 'part'}: cannot be written: ")
    assert "\n" not in error
    assert taken == [*WEIGHTS, *WEIGHTS]  # once for the shapes
    assert not list(tmp_path.iterdir())
    assert writer.write(counted, tmp_path / "part") == ""


def test_a_rank_without_weights_writes_an_empty_part(tmp_path: Path) -> None:
    writer = PartWriter()
    assert writer.write(list, tmp_path / "part") == ""
    assert (writer.size_bytes, load_file(tmp_path / "part")) == (0, {})


def test_another_dtype_than_the_two_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        PartWriter().write(lambda: [("t", torch.zeros(2, dtype=torch.float64))], tmp_path / "part")
