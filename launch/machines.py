"""The machines of a run, for its owner: who is where, what memory it takes, what an update moves."""

from itertools import groupby

from common.config import Config
from common.hardware import GIB
from common.shape import ModelShape
from launch.estimate import (
    engine_memory,
    gib,
    host_bytes,
    parts,
    rank_memory,
    update_bytes,
)
from launch.parameters import model_parameters, rank_parameters
from launch.placement import Placement, Rank, place

_COORDINATES = ("pipeline", "data", "context", "tensor", "expert_data", "expert", "expert_tensor")


def machine_lines(config: Config, shape: ModelShape) -> list[str]:
    """The plan; what is assigned to no GPU has sizes, and no place."""
    total = f"model: {model_parameters(shape):,} parameters"
    moved = f"bytes per weight update: {gib(update_bytes(config, shape))}, read by each of {config.generator.count} "
    update = f"{moved}generators; {config.weights.keep} versions and one in the making are kept"
    if config.placement.gpus_per_node == 0:
        return [total, *_rank_lines(config, shape, None), *_engine_lines(config, shape), update]
    placement = place(config)
    return [
        total,
        *_node_lines(config, placement),
        *_coordinate_lines(config, placement),
        *_rank_lines(config, shape, placement),
        *_engine_lines(config, shape),
        *_host_lines(config, shape, placement),
        update,
    ]


def _node_lines(config: Config, placement: Placement) -> list[str]:
    """Which GPUs of each node have which ranks and engines."""
    gpus = config.placement.gpus_per_node
    used = len(placement.ranks) + sum(len(engine.gpus) for engine in placement.engines)
    nodes = f"{placement.num_nodes} node{'s' if placement.num_nodes > 1 else ''}"
    lines = [f"placement: {used} GPUs on {nodes} of {gpus}; the ledger and the verifiers beside rank 0"]
    for node in range(placement.num_nodes):
        ranks = [rank for rank in placement.ranks if rank.node == node]
        words = [f"GPU {_span([rank.gpu for rank in ranks])} learner {_span([r.rank for r in ranks])}"] if ranks else []
        words += [f"GPU {_span(engine.gpus)} {engine.name}" for engine in placement.engines if engine.node == node]
        lines.append(f"  node {node}: {', '.join(words)}")
    return lines


def _coordinate_lines(config: Config, placement: Placement) -> list[str]:
    """The place of each rank in Megatron's groups; groups of one are left out."""
    parallel = config.learner.parallel
    expert_data = parallel.num_stage_ranks // (parallel.expert * parallel.expert_tensor)
    shared_experts = parallel.expert * parallel.expert_tensor > 1
    sizes = {name: getattr(parallel, name, expert_data) for name in _COORDINATES}
    sizes["expert_data"] = expert_data if shared_experts else 1
    shown = [name for name in _COORDINATES if sizes[name] > 1]
    lines = [f"learner: {', '.join(f'{name} {sizes[name]}' for name in shown) or 'one rank'}"]
    return lines + [f"  {_coordinates(rank, shown)}" for rank in placement.ranks if shown]


def _coordinates(rank: Rank, shown: list[str]) -> str:
    where = ", ".join(f"{name} {getattr(rank, name)}" for name in shown)
    return f"rank {rank.rank} on node {rank.node} GPU {rank.gpu}: {where}"


def _rank_lines(config: Config, shape: ModelShape, placement: Placement | None) -> list[str]:
    """The memory of the ranks of each pipeline stage."""
    parallel, learner = config.learner.parallel, config.learner
    tokens = f"{learner.max_tokens_per_microbatch:,} tokens, recompute {learner.recompute}"
    used = ", experts evenly used" if shape.is_moe else ""
    lines = [f"memory of a learner rank ({tokens}{used}):"]
    for stage in range(parallel.pipeline):
        memory = rank_memory(config, shape, stage)
        first = stage * parallel.num_stage_ranks
        whole = gib(memory.device)
        size = f"{whole} of {config.placement.gpu_memory_gib:g}" if placement else whole
        offloaded = f"; on the host {gib(memory.host)}" if memory.host else ""
        held = f"{rank_parameters(shape, parallel, stage).total:,} parameters"
        ranks = _span(range(first, first + parallel.num_stage_ranks))
        lines.append(f"  rank {ranks}, {held}: {parts(memory)} = {size}{offloaded}")
    return lines


def _engine_lines(config: Config, shape: ModelShape) -> list[str]:
    generator, memory = config.generator, engine_memory(config, shape)
    copies = generator.parallel.data
    cached = f"{generator.max_total_tokens // copies:,} tokens" + (f" in each of {copies} copies" if copies > 1 else "")
    words = f"weights {gib(memory.weights)} + KV cache {gib(memory.kv_cache)} ({cached}) = {gib(sum(memory))}"
    if config.placement.gpus_per_node == 0:
        return [f"memory of an engine: {words}"]
    allowed = gib(generator.memory_share * config.placement.gpu_memory_gib * GIB)
    share = f"{generator.memory_share:g} of {config.placement.gpu_memory_gib:g}"
    num_gpus = generator.parallel.num_gpus
    whose = f"each of an engine's {num_gpus} GPUs" if num_gpus > 1 else "an engine's GPU"
    return [f"memory of {whose}: {words} of {allowed} ({share})"]


def _host_lines(config: Config, shape: ModelShape, placement: Placement) -> list[str]:
    """What nodes hold in their own memory, of the state that is known."""
    sizes = host_bytes(config, shape, placement)
    limit = f"{config.placement.host_memory_gib:g}"
    lines = [f"node {node}: {gib(size)} of {limit}" for node, size in enumerate(sizes) if size]
    return [f"memory of hosts (offloaded state; published weights in {config.weights.dir}): {', '.join(lines)}"]


def _span(numbers: "range | list[int] | tuple[int, ...]") -> str:
    """Neighbours as first-last."""
    spans: list[str] = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        spans.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return " ".join(spans)
