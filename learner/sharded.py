"""Tensors on disk in parts: written by any number of ranks, read by any other number.

The format is torch.distributed.checkpoint's, and so are planning, files and metadata. A tensor has its name and its
size alone; which rank had which part of it is nobody's business who reads it.
"""

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    load,
    save,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from common.errors import RunDirectoryError

_METADATA = ".metadata"
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Part(NamedTuple):
    """A box of a tensor.

    Attributes:
        offsets: Of its first element, in each dimension.
        data: Its elements.
    """

    offsets: tuple[int, ...]
    data: Tensor


class Sharded:
    """This rank's parts of one tensor; with the others' they are the whole of it."""

    def __init__(self, size: tuple[int, ...], parts: list[Part]) -> None:
        """`size` is that of the whole tensor."""
        self._size = torch.Size(size)
        self._parts = {torch.Size(part.offsets): part.data for part in parts}

    def size(self) -> torch.Size:
        """Of the whole tensor."""
        return self._size

    def at(self, index: MetadataIndex) -> Tensor:
        """The part that begins where the index says."""
        assert index.offset is not None
        return self._parts[index.offset]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What torch reads of this rank's parts."""
        return [ChunkStorageMetadata(offsets, data.size()) for offsets, data in self._parts.items()]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """What torch writes of this rank's parts."""
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk, TensorProperties.create_from_tensor(self._parts[chunk.offsets]), self._size
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]


State = Mapping[str, Sharded | Tensor]


def write(path: Path, state: State, group: dist.ProcessGroup | None) -> None:
    """Writes a directory, which is made; all ranks of the group at the same time.

    Args:
        path: On a file system that all share.
        state: This rank's parts, and whole tensors, each of which is written once.
        group: Of gloo; None where there is one rank. Nothing else may use it meanwhile.

    Raises:
        RunDirectoryError: It cannot be written.
    """
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _one_line(path, "written"):
        path.mkdir(parents=True, exist_ok=True)
        writer = FileSystemWriter(path, per_thread_copy_ahead=0)  # else its thread makes a context on the first GPU
        save(dict(state), storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)


def files_of(path: Path, rank: int) -> list[Path]:
    """The files of a directory that a rank has written: its data, and of the first one the metadata."""
    metadata = [path / _METADATA] if rank == 0 else []
    return [*sorted(path.glob(f"__{rank}_*")), *metadata]


def read(path: Path, state: State, group: dist.ProcessGroup | None = None) -> None:
    """Fills the parts and tensors of `state` with what a directory holds under their names.

    Raises:
        RunDirectoryError: It is missing, broken, or holds others.
    """
    with _one_line(path, "read"):
        reader = _reader(path)
        load(dict(state), storage_reader=reader, planner=_LoadPlanner(), process_group=group, no_dist=group is None)


def sizes(path: Path) -> dict[str, torch.Size]:
    """The tensors that a directory holds, and their sizes.

    Raises:
        RunDirectoryError: It is missing or broken.
    """
    with _one_line(path, "read"):
        found = _reader(path).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return _part(self.state_dict, index)


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.flatten_state_dict = False

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _part(self.state_dict, index)


def _part(state: dict[str, Any], index: MetadataIndex) -> Tensor:
    entry: Sharded | Tensor = state[index.fqn]
    return entry.at(index) if isinstance(entry, Sharded) else entry


def _reader(path: Path) -> FileSystemReader:
    if not (path / _METADATA).is_file():
        raise FileNotFoundError(f"found no {_METADATA}, expected a directory that was written whole")
    return FileSystemReader(path)


@contextmanager
def _one_line(path: Path, verb: str) -> Generator[None]:
    try:
        yield
    except (OSError, CheckpointException) as error:
        failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
        cause = failures[0][0] if failures else error
        reason = getattr(cause, "strerror", None) or cause
        raise RunDirectoryError(f"{path}: cannot be {verb}: {reason}") from error
