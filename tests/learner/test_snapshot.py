"""A rank's weights as a part: whole or absent, and every tensor is taken whatever fails."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import RunDirectoryError
from learner.record import Stopwatch
from learner.snapshot import PartWriter
from tests.learner.test_checkpoints import limited_files

WEIGHTS = {
    "embedding": torch.randn(7, 3).bfloat16(),
    "norm": torch.randn(5),
    "scalar": torch.tensor(-0.0),
    "head": torch.randn(300, 200).bfloat16(),
}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """What tells minus zero from zero, too."""
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def export() -> Iterator[tuple[str, torch.Tensor]]:
    yield from WEIGHTS.items()


def test_a_part_has_every_tensor_bit_for_bit_version_after_version(tmp_path: Path) -> None:
    writer = PartWriter()
    writer.write(export, tmp_path / "0.0.safetensors")
    moved = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    writer.write(moved.items, tmp_path / "0.1.safetensors")
    for name, expected in (("0.0", WEIGHTS), ("0.1", moved)):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert {name: bits(tensor) for name, tensor in found.items()} == {n: bits(t) for n, t in expected.items()}
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
    with limited_files(50_000), pytest.raises(RunDirectoryError, match="part: cannot be written: ") as caught:
        writer.write(counted, tmp_path / "part")
    assert "\n" not in str(caught.value)
    assert taken == [*WEIGHTS, *WEIGHTS]  # once for the shapes
    assert not list(tmp_path.iterdir())
    writer.write(counted, tmp_path / "part")
    assert (tmp_path / "part").exists()


def test_a_tensor_is_gone_before_the_next_one_is_made(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abc":
            assert not [each for each in made if each() is not None]
            tensor = torch.ones(300)
            made.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    PartWriter().write(lambda: Stopwatch().each("export", counted()), tmp_path / "part")
    assert len(made) == 6  # once for the shapes


def test_a_rank_without_weights_writes_an_empty_part(tmp_path: Path) -> None:
    writer = PartWriter()
    writer.write(list, tmp_path / "part")
    assert (writer.size_bytes, load_file(tmp_path / "part")) == (0, {})


def test_another_dtype_than_the_two_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        PartWriter().write(lambda: [("t", torch.zeros(2, dtype=torch.float64))], tmp_path / "part")
