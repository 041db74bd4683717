"""A rank's weights as a part: one file on memory-backed storage, written while training waits."""

import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from common.errors import RunDirectoryError
from common.weights.parts import DType, TensorEntry, part_header
from learner.publisher.reports import PARTIAL

Tensors = Iterable[tuple[str, torch.Tensor]]
_DTYPES: dict[torch.dtype, DType] = {torch.bfloat16: "BF16", torch.float32: "F32"}


class PartWriter:
    """Writes the same tensors again and again; beside the file it holds no more than one of them.

    Attributes:
        size_bytes: Size of the tensors of this rank; 0 where it has none.
    """

    def __init__(self) -> None:
        self._header = b""
        self._entries: dict[str, TensorEntry] = {}
        self.size_bytes = 0

    def write(self, export: Callable[[], Tensors], path: Path) -> None:
        """Writes a part, whole or not at all.

        Every rank takes all of its tensors, whatever failed: ranks make each of them together. A tensor is let go
        before the next one is made.

        Args:
            export: Name and tensor of each weight of this rank. The first call takes them twice, once for the shapes.
            path: The file to make.

        Raises:
            RunDirectoryError: There is no room.
        """
        if not self._header:
            self._learn_shapes(export())
        rest, temporary = export(), path.with_name(f".{path.name}{PARTIAL}")
        try:
            self._copy(rest, temporary)
            temporary.rename(path)
        except OSError as error:
            for _ in rest:
                pass
            temporary.unlink(missing_ok=True)
            raise RunDirectoryError(f"{path}: cannot be written: {error.strerror}") from error

    def _learn_shapes(self, tensors: Tensors) -> None:
        described: list[tuple[str, DType, tuple[int, ...]]] = []
        for name, tensor in tensors:
            described.append((name, _DTYPES[tensor.dtype], tuple(tensor.shape)))
            del tensor
        self._header, entries = part_header(described)
        self._entries = {entry.name: entry for entry in entries}
        self.size_bytes = entries[-1].end if entries else 0

    def _copy(self, tensors: Tensors, path: Path) -> None:
        """Copies each tensor to its place in the file, whose room is taken first: a full disk is no SIGBUS.

        Raises:
            OSError: There is no room.
        """
        size_bytes = len(self._header) + self.size_bytes
        with path.open("wb+") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
            mapped = torch.frombuffer(mmap.mmap(file.fileno(), size_bytes), dtype=torch.uint8)
        mapped[: len(self._header)] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        data = mapped[len(self._header) :]
        for name, tensor in tensors:
            entry = self._entries[name]
            assert tuple(tensor.shape) == entry.shape, f"{name} has another shape than before"
            data[entry.start : entry.end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            del tensor
