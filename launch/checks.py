"""What can be known to fail before anything starts: the model directory, files, memory-backed space, the port."""

import json
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import msgspec

from common import wire
from common.architectures import check_architecture, read_object
from common.config import Config
from common.errors import ConfigError, DataError, ModelError, RunDirectoryError
from common.routes import MAX_EXPERTS, route_shape
from common.sections import DataFile
from common.shape import ModelShape, check_division, check_engine, check_experts, read_shape
from launch.activations import ITEM_BYTES
from launch.estimate import check_fits, published_copies, pulled_copies, readable
from launch.parameters import model_parameters
from launch.placement import Placement, place
from launch.tiny_sizes import tiny_shape

SIZES = Path(__file__).resolve().parent / "models"
DEVICES = Path("/dev")


def resolve_paths(config: Config, base: Path) -> Config:
    """The configuration with absolute paths: relative ones are meant from where the user stands, `base`."""

    def resolve(path: str) -> str:
        return str((base / Path(path).expanduser()).absolute()) if path else path

    def files(value: str | tuple[DataFile, ...]) -> str | tuple[DataFile, ...]:
        if isinstance(value, str):
            return resolve(value)
        return tuple(msgspec.structs.replace(file, path=resolve(file.path)) for file in value)

    replace = msgspec.structs.replace
    return replace(
        config,
        model=resolve(config.model),
        run=replace(config.run, dir=resolve(config.run.dir)),
        data=replace(config.data, train=files(config.data.train), test=files(config.data.test)),
        weights=replace(config.weights, dir=resolve(config.weights.dir)),
    )


def check_inputs(config: Config) -> ModelShape:
    """Checks all that the run reads and needs, and that costs nothing to look at; the model's sizes.

    Raises:
        UsageError: Something is missing, broken, too small or taken.
    """
    _check_files(config)
    if config.made_for and not config.model:
        raise ModelError(
            f"model: found nothing, expected model=DIR data.train=FILE with {config.made_for} in DIR, which this "
            f"layout is made for: hf download {config.made_for} --local-dir DIR"
        )
    num_parameters = count_parameters(Path(config.model)) if config.model else 0
    shape, where = _shape(config)
    _check_shape(config, shape, where)
    if config.placement.gpus_per_node:
        _check_machine(place(config), config.placement.gpus_per_node)
    check_space(config, num_parameters or model_parameters(shape))
    check_port(config.run.host, config.run.ledger_port)
    return shape


def check_plan(config: Config) -> ModelShape:
    """The checks of a dry run, which may be far from the machines of the run; the model's sizes.

    A directory may hold `config.json` alone. Without `model` the sizes are those of `made_for`, or of the tiny model.
    Where no GPUs are assigned the run would be here, so that space and port are looked at, too.

    Raises:
        UsageError: Something is missing, broken, too small or taken.
    """
    _check_files(config)
    num_parameters = 0
    if config.model and (any(Path(config.model).glob("*.safetensors*")) or not Path(config.model).is_dir()):
        num_parameters = count_parameters(Path(config.model))
    shape, where = _shape(config)
    _check_shape(config, shape, where)
    if config.placement.gpus_per_node == 0:
        check_space(config, num_parameters or model_parameters(shape))
        check_port(config.run.host, config.run.ledger_port)
    return shape


def _check_files(config: Config) -> None:
    for key, files in (("data.train", config.data.train_files), ("data.test", config.data.test_files)):
        for file in files:
            if not Path(file.path).is_file():
                raise DataError(f"{key}: {file.path}: not found, expected a file of prompts")


def _shape(config: Config) -> tuple[ModelShape, str]:
    """The sizes of the run's model, and where they are from."""
    if not config.model and not config.made_for:
        return tiny_shape(config.tiny.num_experts), "the built-in model"
    directory = Path(config.model) if config.model else _sizes(config.made_for)
    return read_shape(directory), str(directory / "config.json")


def _check_shape(config: Config, shape: ModelShape, where: str) -> None:
    """What can be said of a model by its sizes."""
    check_positions(config, shape, where)
    check_division(shape, config.learner.parallel)
    check_experts(shape, config.learner)
    check_engine(shape, config.generator.parallel)
    check_routing(config, shape)
    check_fits(config, shape)


def _check_machine(placement: Placement, gpus_per_node: int) -> None:
    """Checks that this machine is all that the run takes, and that it has the GPUs."""
    if placement.num_nodes > 1:
        raise ConfigError(
            f"placement: found {placement.num_nodes} nodes of {gpus_per_node} GPUs, expected 1: processes on other "
            "machines are not started yet; --dry-run shows the plan"
        )
    num_here = len(list(DEVICES.glob("nvidia[0-9]*")))
    if placement.num_gpus > num_here:
        raise ConfigError(
            f"placement: found {placement.num_gpus} GPUs for learner ranks and engines, expected at most the "
            f"{num_here} of this machine; --dry-run shows the plan"
        )


def _sizes(made_for: str) -> Path:
    directory = SIZES / Path(made_for).name
    if not directory.is_dir():
        known = ", ".join(sorted(path.name for path in SIZES.iterdir()))
        raise ConfigError(f"made_for: found {made_for!r}, expected a model whose sizes are in launch/models: {known}")
    return directory


def count_parameters(model: Path) -> int:
    """The number of parameters of a checkpoint, from the heads of its weight files.

    Raises:
        ModelError: The directory is missing, broken, or of an architecture that is not supported.
    """
    check_architecture(model)
    read_object(model / "tokenizer.json", "the model's fast tokenizer")
    return sum(_parameters_of(path) for path in _weight_files(model))


def check_positions(config: Config, shape: ModelShape, where: str) -> None:
    """Checks that the model has a position for each token of the longest prompt with the longest response.

    Raises:
        ModelError: It has fewer.
    """
    positions = shape.max_position_embeddings
    for key, sampling in (("sampling", config.sampling), ("evaluation.sampling", config.evaluation.sampling)):
        longest = config.data.max_prompt_tokens + sampling.max_tokens
        if positions < longest:
            raise ModelError(
                f"{where}: found max_position_embeddings = {positions}, expected at least data.max_prompt_tokens + "
                f"{key}.max_tokens = {longest}"
            )


def check_routing(config: Config, shape: ModelShape) -> None:
    """Checks that the engine's routes can be replayed, and that a group that carries them fits a message.

    Raises:
        ConfigError: The model has no experts or too many, or the longest group is too large.
    """
    if not config.learner.routing_replay:
        return
    if not shape.is_moe:
        raise ConfigError("learner.routing_replay: found true, expected false: the model has no experts")
    if shape.total_experts > MAX_EXPERTS:
        raise ConfigError(
            f"learner.routing_replay: found true with the model's num_experts = {shape.total_experts}, expected at "
            f"most {MAX_EXPERTS}: a routed expert travels as a byte"
        )
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    size_bytes = config.group_size * longest * route_shape(shape).size_bytes
    if size_bytes > wire.MAX_MESSAGE_BYTES // 2:
        raise ConfigError(
            f"learner.routing_replay: found true with up to {readable(size_bytes)} of routed experts in a group, "
            f"expected at most {readable(wire.MAX_MESSAGE_BYTES // 2)}: group_size * (data.max_prompt_tokens + "
            "sampling.max_tokens) * layers * num_experts_per_tok"
        )


def check_space(config: Config, num_parameters: int) -> None:
    """Checks that `weights.dir` holds what the learner keeps of the weights, and a copy for each generator.

    Raises:
        RunDirectoryError: It is missing or too small.
    """
    directory = Path(config.weights.dir)
    if not directory.is_dir():
        raise RunDirectoryError(f"weights.dir: {directory}: not found, expected a memory-backed directory")
    copies = published_copies(config) + config.generator.count * pulled_copies(config)
    needed = copies * num_parameters * ITEM_BYTES[config.learner.dtype]
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunDirectoryError(
            f"weights.dir: {directory}: found {readable(free)} free, expected {readable(needed)}: room for the weights "
            f"{copies:g} times: weights.retention + 2 for the learner, 1 for each generator, and deltas"
        )


def check_port(host: str, port: int) -> None:
    """Checks that the ledger can listen.

    Raises:
        RunDirectoryError: The address is not this machine's, or the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            key, expected = ("run.ledger_port", "a free port") if port else ("run.host", "an address of this machine")
            raise RunDirectoryError(f"{key}: found {host}:{port} ({error.strerror}), expected {expected}") from error


def _weight_files(model: Path) -> list[Path]:
    index = model / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(model.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{model}: found no weights, expected model.safetensors or an index of several files")
        return files
    files = [model / name for name in sorted(set(read_object(index, "").get("weight_map", {}).values()))]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None or not files:
        raise ModelError(f"{missing or index}: found no weights, expected the files that {index.name} names")
    return files


def _parameters_of(path: Path) -> int:
    """Of one safetensors file: eight bytes of length, a head in JSON, the data."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            head: dict[str, Any] = json.loads(file.read(length)) if 8 + length <= size_bytes else {}
            tensors = [tensor for name, tensor in head.items() if name != "__metadata__"]
            expected = 8 + length + max(tensor["data_offsets"][1] for tensor in tensors)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ModelError(f"{path}: found no head of weights, expected a safetensors file") from error
    if size_bytes != expected:
        raise ModelError(f"{path}: found {size_bytes:,} bytes, expected {expected:,}: the file is cut or damaged")
    return sum(math.prod(tensor["shape"]) for tensor in tensors)
