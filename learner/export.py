"""A policy's weights as a Hugging Face directory."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.errors import RunDirectoryError

SHARD_BYTES = 4 << 30
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def write_hugging_face(
    tensors: Iterable[tuple[str, torch.Tensor]], model_dir: Path, target: Path, *, whole_model: bool
) -> int:
    """Writes `target`, whole or not at all, and returns the size of its weights in bytes.

    Args:
        tensors: Name and tensor of each weight, one at a time.
        model_dir: The model that the run started from: its config (and all that is no weight) is copied.
        target: The directory to make; what stands there is replaced.
        whole_model: Whether tokenizer and generation config come along, for people; an engine needs only the config.

    Raises:
        RunDirectoryError: The disk is full or the directory cannot be written; nothing is left of it.
    """
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        size_bytes = _write_shards(tensors, temporary)
        for source in model_dir.iterdir():
            is_wanted = source.is_file() and not source.name.endswith(_WEIGHTS)
            if is_wanted and (whole_model or source.name == "config.json"):
                shutil.copyfile(source, temporary / source.name)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunDirectoryError(f"{target}: cannot be written: {error.strerror or error}") from error
    return size_bytes


def _write_shards(tensors: Iterable[tuple[str, torch.Tensor]], directory: Path) -> int:
    names: list[list[str]] = []
    size_bytes = 0
    for shard in _shards(tensors):
        save_file(shard, directory / _shard_name(len(names)), metadata={"format": "pt"})
        names.append(list(shard))
        size_bytes += sum(t.nbytes for t in shard.values())
    if len(names) == 1:
        (directory / _shard_name(0)).rename(directory / "model.safetensors")
        return size_bytes
    index = {
        "metadata": {"total_size": size_bytes},
        "weight_map": {name: _shard_name(i) for i, shard in enumerate(names) for name in shard},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return size_bytes


def _shards(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size_bytes = 0
    for name, tensor in tensors:
        if shard and size_bytes + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size_bytes = {}, 0
        shard[name] = tensor.detach().contiguous().cpu()
        size_bytes += tensor.nbytes
    yield shard


def _shard_name(index: int) -> str:
    return f"model-{index + 1:05d}.safetensors"
