"""The machines of a run, for its owner: who is where, what memory it takes, what an update moves."""

from itertools import groupby

from common.config import Config
from common.hardware import GIB
from common.shape import ModelShape
from launch.estimate import (
    RESERVE_BYTES,
    anchor_interval,
    assumed_delta,
    checkpoint_bytes,
    engine_memory,
    host_memory,
    host_parts,
    published_copies,
    pulled_copies,
    rank_host_parts,
    rank_memory,
    readable,
    update_bytes,
)
from launch.parameters import model_parameters, rank_parameters
from launch.placement import Placement, Rank, place, rank_places

_COORDINATES = ("pipeline", "data", "context", "tensor", "expert_data", "expert", "expert_tensor")


def machine_lines(config: Config, shape: ModelShape) -> list[str]:
    """The plan; what is assigned to no GPU has sizes, and no place."""
    name = config.model or config.made_for or "the built-in one"
    total = f"model: {name}, {model_parameters(shape):,} parameters"
    if config.placement.gpus_per_node == 0:
        ranks = rank_places(config.learner.parallel, config.learner.parallel.num_ranks)
        words = "placement: this machine; each process takes what it finds there, or the CPU"
        placed = [words, *_coordinate_lines(config, ranks)]
        hosts: list[str] = []
    else:
        placement = place(config)
        placed = [*_node_lines(config, placement), *_coordinate_lines(config, placement.ranks)]
        hosts = _host_lines(config, shape, placement)
    return [
        total,
        *placed,
        *_rank_lines(config, shape),
        *_engine_lines(config, shape),
        *hosts,
        *_update_lines(config, shape),
        *_checkpoint_lines(config, shape),
        *_assumptions(config, shape),
    ]


def _node_lines(config: Config, placement: Placement) -> list[str]:
    """Which GPUs of each node have which ranks and engines."""
    gpus = config.placement.gpus_per_node
    nodes = f"{placement.num_nodes} node{'s' if placement.num_nodes > 1 else ''}"
    lines = [f"placement: {placement.num_gpus} GPUs on {nodes} of {gpus}; the ledger and the verifiers beside rank 0"]
    for node in range(placement.num_nodes):
        ranks = [rank for rank in placement.ranks if rank.node == node]
        words = [f"GPU {_span([rank.gpu for rank in ranks])} learner {_span([r.rank for r in ranks])}"] if ranks else []
        words += [f"GPU {_span(engine.gpus)} {engine.name}" for engine in placement.engines if engine.node == node]
        lines.append(f"  node {node}: {', '.join(words)}")
    if placement.num_nodes > 1:
        lines += [
            "  This is a plan: the launcher starts processes on one machine alone, and refuses to start these; nor are",
            f"  sockets on {config.run.host} seen from another node.",
        ]
    return lines


def _coordinate_lines(config: Config, ranks: tuple[Rank, ...]) -> list[str]:
    """The place of each rank in Megatron's groups; groups of one are left out."""
    parallel = config.learner.parallel
    expert_data = parallel.num_stage_ranks // (parallel.expert * parallel.expert_tensor)
    shared_experts = parallel.expert * parallel.expert_tensor > 1
    sizes = {name: getattr(parallel, name, expert_data) for name in _COORDINATES}
    sizes["expert_data"] = expert_data if shared_experts else 1
    shown = [name for name in _COORDINATES if sizes[name] > 1]
    lines = [f"learner: {', '.join(f'{name} {sizes[name]}' for name in shown) or 'one rank'}"]
    on_gpus = config.placement.gpus_per_node > 0
    for rank in ranks if shown else ():
        where = f" on node {rank.node} GPU {rank.gpu}" if on_gpus else ""
        lines.append(f"  rank {rank.rank}{where}: {', '.join(f'{name} {getattr(rank, name)}' for name in shown)}")
    return lines


def _rank_lines(config: Config, shape: ModelShape) -> list[str]:
    """The memory of the ranks of each pipeline stage."""
    parallel, learner = config.learner.parallel, config.learner
    lines = [
        f"memory of each learner rank (micro-batches of {learner.max_tokens_per_microbatch:,} tokens, recompute "
        f"{learner.recompute}):"
    ]
    for stage in range(parallel.pipeline):
        memory = rank_memory(config, shape, stage)
        first = stage * parallel.num_stage_ranks
        ranks = _span(range(first, first + parallel.num_stage_ranks))
        lines.append(f"  rank {ranks}, {rank_parameters(shape, parallel, stage).total:,} parameters:")
        state = "masters and moments" if learner.dtype == "bfloat16" else "moments"
        on_gpu = "masters; the moments are on the host" if learner.offload_optimizer else state
        rows = [
            ("weights", memory.weights, learner.dtype),
            ("gradients", memory.gradients, "float32"),
            ("optimizer", memory.optimizer, f"float32 {on_gpu}; this rank's share of its replicas'"),
            ("activations", memory.activations, "kept from forward to backward passes"),
            ("one layer", memory.layer, "what its backward pass needs beside them"),
            ("logits", memory.logits, "at another time than the layer: the larger of the two counts"),
        ]
        if config.placement.gpus_per_node:
            rows.append(("reserve", RESERVE_BYTES, "CUDA's context, NCCL's buffers, fragmentation"))
            lines += [*_table(rows), _sum(memory.device, config.placement.gpu_memory_gib * GIB)]
        else:
            lines += [*_table(rows), _sum(memory.device - RESERVE_BYTES, None)]
        lines.append(_row("on the host", memory.host, rank_host_parts(memory)))
    return lines


def _engine_lines(config: Config, shape: ModelShape) -> list[str]:
    generator, memory = config.generator, engine_memory(config, shape)
    parallel = generator.parallel
    copies, num_gpus = parallel.data, parallel.num_gpus
    cached = generator.max_total_tokens // copies
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    where = f" in each of {copies} copies" if copies > 1 else ""
    held = f"{cached:,} tokens{where}: {cached // longest:,} of the longest sequences"
    rows = [("weights", memory.weights, generator.dtype), ("KV cache", memory.kv_cache, held)]
    if config.placement.gpus_per_node == 0:
        return ["memory of each engine:", *_table(rows), _sum(sum(memory), None)]
    whole = config.placement.gpu_memory_gib * GIB
    allowed = generator.memory_share * whole
    gpus = f"each of an engine's {num_gpus} GPUs" if num_gpus > 1 else "each engine's GPU"
    division = ", ".join(f"{name} {getattr(parallel, name)}" for name in ("tensor", "data", "expert"))
    return [
        f"memory of {gpus} ({division}):",
        *_table(rows),
        _sum(sum(memory), allowed) + f"; {readable(whole - allowed)} are left for its activations and CUDA graphs",
    ]


def _host_lines(config: Config, shape: ModelShape, placement: Placement) -> list[str]:
    """What nodes hold in their own memory, of the state that is known."""
    limit = config.placement.host_memory_gib * GIB
    lines = ["memory of each node beside its GPUs:"]
    for node, memory in enumerate(host_memory(config, shape, placement)):
        size = (
            f"{host_parts(memory)} = {readable(sum(memory))} of {readable(limit)}, {readable(limit - sum(memory))} free"
        )
        lines.append(f"  node {node}: {size if sum(memory) else 'nothing that is counted'}")
    return lines


def _update_lines(config: Config, shape: ModelShape) -> list[str]:
    size_bytes, weights, count = update_bytes(config, shape), config.weights, config.generator.count
    changed_share, bytes_share = assumed_delta(config)
    pullers = f"{count} generator{'s' if count > 1 else ''}"
    interval = anchor_interval(config)
    kept = "each version" if interval == 1 else f"one version in {interval:,}"
    published, pulled = (readable(copies(config) * size_bytes) for copies in (published_copies, pulled_copies))
    return [
        f"bytes per weight update: {readable(bytes_share * size_bytes)} to each of {pullers}, where "
        f"{changed_share:.1%} of the elements change; the whole model, {readable(size_bytes)}, to one that joins",
        f"  {kept} is kept whole; with the newest and the one in the making the "
        f"learner has {published} in {weights.dir}, and each generator {pulled}",
    ]


def _checkpoint_lines(config: Config, shape: ModelShape) -> list[str]:
    """What checkpoints take of the run directory's disk, and what a stop writes of them."""
    learner, size_bytes, exported = config.learner, checkpoint_bytes(shape), update_bytes(config, shape)
    every = learner.checkpoint_every
    kept = f"{learner.keep_checkpoints} of the newest, the best"
    count = learner.keep_checkpoints + 2
    if learner.keep_every and (num := config.steps // learner.keep_every):
        kept, count = f"{kept}, {num} of learner.keep_every", count + num
    return [
        f"bytes per checkpoint: {readable(size_bytes)}, weights and both moments in float32, every "
        f"{every:,} steps; for transformers and SGLang {readable(exported)} more where training ends",
        f"  {kept} and one in the making are in the run directory: {readable(count * size_bytes)} at most, and "
        f"{readable(exported)} for each where training ended",
        "  a stop waits for the step and the save under way, for another save and for those weights: "
        f"{readable(2 * size_bytes + exported)} within run.stop_timeout_s = {config.run.stop_timeout_s:g}",
    ]


def _assumptions(config: Config, shape: ModelShape) -> list[str]:
    """What the numbers take for granted."""
    changed_share, bytes_share = assumed_delta(config)
    share = f"{changed_share:.1%} of the elements, {bytes_share:.1%} of the bytes"
    lines = ["assumed:", f"  a version changes {share}: as measured in {config.learner.dtype} (docs/weights.md)"]
    if shape.is_moe:
        lines.append("  each expert gets as many tokens as the others; a rank whose experts get more needs more")
    if config.placement.gpus_per_node:
        lines += [
            f"  {readable(RESERVE_BYTES)} of reserve and memory_share are enough: neither has been measured on a GPU",
            "  activations are those of Megatron's local layers, which a test measures on a CPU; fused ones keep less",
            "  nodes: no more than the state named above; processes, data and the page cache come on top",
        ]
    else:
        lines.append("  processes, data and the page cache come on top")
    return lines


def _table(rows: list[tuple[str, int, str]]) -> list[str]:
    return [_row(*row) for row in rows]


def _row(name: str, size_bytes: int, words: str) -> str:
    return f"    {name:<12}{readable(size_bytes):>12}  {words}".rstrip()


def _sum(size_bytes: int, limit: float | None) -> str:
    """The last row of a table; with a limit, what is left of it."""
    room = "" if limit is None else f"of {readable(limit)}, {readable(limit - size_bytes)} free"
    return _row("in all", size_bytes, room)


def _span(numbers: "range | list[int] | tuple[int, ...]") -> str:
    """Neighbours as first-last."""
    spans: list[str] = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        spans.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return " ".join(spans)
