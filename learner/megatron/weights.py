"""The tensors of a Hugging Face directory: safetensors, in one file or in shards."""

from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class WeightFiles:
    """Reads tensors by name; a file is opened once, and mapped.

    Attributes:
        directory: Of the model.
    """

    def __init__(self, directory: Path) -> None:
        """Raises ModelError where there are no weights, or their index is broken."""
        self.directory = directory
        self._files: dict[str, Any] = {}
        if (directory / _INDEX).exists():
            self._file_of = self._read_index(directory / _INDEX)
        elif (directory / _SINGLE).exists():
            self._file_of = dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        else:
            raise ModelError(f"{directory}: found no weights, expected {_SINGLE} or {_INDEX}")

    def shape(self, name: str) -> list[int]:
        """Of one tensor.

        Raises:
            ModelError: It is missing, or its file is missing or broken.
        """
        return list(self._slice(name).get_shape())

    def read(self, name: str, dim: int = 0, part: int = 0, num_parts: int = 1) -> Tensor:
        """One tensor, or one of equal parts of it along a dimension (0 or 1), on the CPU.

        Raises:
            ModelError: It is missing, or its file is missing or broken.
        """
        whole = self._slice(name)
        size = whole.get_shape()[dim] // num_parts
        rows = slice(part * size, (part + 1) * size)
        return whole[rows] if dim == 0 else whole[:, rows]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ModelError(
                f"{self.directory}: found no tensor {name}, expected it beside {len(self._file_of)} others"
            )
        file = self._file_of[name]
        try:
            return self._open(file).get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self.directory / file}: found no readable tensor {name}: {error}") from error

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.directory / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{self.directory / file}: found no valid safetensors file: {error}") from error
        return self._files[file]

    @staticmethod
    def _read_index(path: Path) -> dict[str, str]:
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Index).weight_map
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: found no valid index of weights: {error}") from error
