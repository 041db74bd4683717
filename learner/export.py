"""Weights as a Hugging Face directory; `python -m learner.export CHECKPOINT DIR` makes one from a checkpoint."""

import argparse
import json
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common.config import Config
from common.errors import ModelError, RunDirectoryError, exit_on_error
from common.layout import RESOLVED, read_resolved
from learner.ranks import Ranks
from learner.saved import MEGATRON, WEIGHT, SavePoint
from learner.sharded import read, sizes
from learner.sums import check_files

SHARD_BYTES = 4 << 30
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def main() -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m learner.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="such as RUN/checkpoints/best")
    parser.add_argument("directory", type=Path, help="new or empty")
    arguments = parser.parse_args()
    with exit_on_error():
        export_checkpoint(arguments.checkpoint, arguments.directory)


def export_checkpoint(checkpoint: Path, target: Path) -> int:
    """Writes the Hugging Face form of a checkpoint, whole or not at all; returns the size of its weights in bytes.

    One process does it, without a GPU, whatever division over ranks wrote the checkpoint; 4 GiB of weights are in
    memory at a time, twice.

    Raises:
        DamageError: The checkpoint is missing, half-written, or not what was written.
        RunDirectoryError: It was moved out of its run; `target` is in use; the disk is full.
        ModelError: The model that the run started from is not there: its config and tokenizer come along.
    """
    point = SavePoint.read(checkpoint)
    run_dir, target = _run_of(checkpoint), target.resolve()
    config = read_resolved(run_dir)
    if not (Path(config.model) / "config.json").is_file():
        raise ModelError(
            f"{run_dir / RESOLVED}: model: found {config.model} without config.json, expected the directory that the "
            "run started from"
        )
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise RunDirectoryError(f"{target}: found something there, expected a new or empty directory")
    check_files(checkpoint / MEGATRON, point.files, Ranks())
    weights = _saved_weights(checkpoint / MEGATRON, config)
    return write_hugging_face(weights, Path(config.model), target, Ranks())


def write_hugging_face(tensors: Iterable[tuple[str, torch.Tensor]], model_dir: Path, target: Path, ranks: Ranks) -> int:
    """Writes `target`, whole or not at all, and returns the size of its weights in bytes.

    Each rank writes its own weights, to a file system that all share.

    Args:
        tensors: Name and tensor of each weight of this rank, one at a time.
        model_dir: The model that the run started from: its config (and all that is no weight) is copied.
        target: The directory to make; what stands there is replaced.
        ranks: All of them make this call.

    Raises:
        RunDirectoryError: The disk of a rank is full or the directory cannot be written, as all ranks hear; nothing is
            left of it.
    """
    temporary = target.with_name(f".{target.name}.partial")

    def begin() -> bool:
        with _one_line(target):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        return True

    def commit() -> bool:
        with _one_line(target):
            _write_index(shards, temporary)
            _copy_rest(model_dir, temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        return True

    try:
        ranks.share(begin, bool)
        shards = _write_shards(tensors, temporary, target, ranks)
        ranks.share(commit, bool)
    except RunDirectoryError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return sum(shard.size_bytes for shard in shards)


@contextmanager
def _one_line(target: Path) -> Generator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunDirectoryError(f"{target}: cannot be written: {reason}") from error


def _run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint is in.

    Raises:
        RunDirectoryError: It is in none.
    """
    directory = checkpoint.resolve().parent
    if directory.name != "checkpoints" or not (directory.parent / RESOLVED).is_file():
        raise RunDirectoryError(
            f"{checkpoint}: found a checkpoint in {directory}, expected one in RUN/checkpoints: it is exported by the "
            f"{RESOLVED} of its run"
        )
    return directory.parent


def _saved_weights(path: Path, config: Config) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each weight in a checkpoint, in the run's dtype: the optimizer's float32, rounded."""
    dtype = torch.bfloat16 if config.learner.dtype == "bfloat16" else torch.float32
    found = ((name, torch.empty(size)) for name, size in sorted(sizes(path).items()) if name.startswith(WEIGHT))
    for shard in _shards(found):
        read(path, shard)
        yield from ((name.removeprefix(WEIGHT), tensor.to(dtype)) for name, tensor in shard.items())


class _Shard(msgspec.Struct, frozen=True):
    """One file of weights."""

    file: str
    names: list[str]
    size_bytes: int


class _Written(msgspec.Struct, frozen=True):
    """What a rank says of its shards: what it wrote, and what failed."""

    shards: list[_Shard]
    error: str


def _write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], directory: Path, target: Path, ranks: Ranks
) -> list[_Shard]:
    """Writes this rank's shards; returns those of all ranks.

    A rank that cannot write draws its weights to their end: ranks make each of them together.

    Raises:
        RunDirectoryError: A rank cannot.
    """
    written: list[_Shard] = []
    error = ""
    for shard in _shards(tensors):
        if error:
            continue
        file = f"model-{ranks.rank + 1:05d}-{len(written) + 1:05d}.safetensors"
        try:
            with _one_line(target):
                save_file(shard, directory / file, metadata={"format": "pt"})
        except RunDirectoryError as failure:
            error = str(failure)
        written.append(_Shard(file, list(shard), sum(t.nbytes for t in shard.values())))
    gathered = ranks.gather(msgspec.msgpack.encode(_Written(written, error)))
    told = [msgspec.msgpack.decode(part, type=_Written) for part in gathered]
    if error := next((each.error for each in told if each.error), ""):
        raise RunDirectoryError(error)
    return [shard for each in told for shard in each.shards]


def _write_index(shards: list[_Shard], directory: Path) -> None:
    """Says which file has which weight; a single file needs no index."""
    if len(shards) == 1:
        (directory / shards[0].file).rename(directory / "model.safetensors")
        return
    index = {
        "metadata": {"total_size": sum(shard.size_bytes for shard in shards)},
        "weight_map": {name: shard.file for shard in shards for name in shard.names},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _copy_rest(model_dir: Path, directory: Path) -> None:
    """What is no weight."""
    for source in model_dir.iterdir():
        if source.is_file() and not source.name.endswith(_WEIGHTS):
            shutil.copyfile(source, directory / source.name)


def _shards(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size_bytes = 0
    for name, tensor in tensors:
        if shard and size_bytes + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size_bytes = {}, 0
        shard[name] = tensor.detach().contiguous().cpu()
        size_bytes += tensor.nbytes
    if shard:
        yield shard


if __name__ == "__main__":
    main()
