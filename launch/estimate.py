"""What memory a run needs, by arithmetic: each learner rank and each engine's GPU by part, hosts, an update."""

from typing import NamedTuple

from common.config import Config
from common.errors import ConfigError
from common.hardware import GIB, MIB
from common.shape import ModelShape
from common.weights.pulling import AHEAD_SHARE
from launch.activations import ITEM_BYTES, held_bytes
from launch.parameters import engine_parameters, model_parameters, rank_parameters
from launch.placement import Placement, place

RESERVE_BYTES = 4 * GIB  # an assumption: CUDA's context, NCCL's buffers, fragmentation
_CHUNK_ELEMENTS, _MIN_CHUNK_ROWS = 1 << 24, 64  # of learner/megatron/logprobs.py
_MASTER_BYTES, _MOMENT_BYTES, _GRADIENT_BYTES = 4, 8, 4


class RankMemory(NamedTuple):
    """Bytes of a learner rank, at the peak of an update.

    Attributes:
        weights: Parameters in the learner's dtype.
        gradients: Their sums over micro-batches, in float32.
        optimizer: Masters and moments on the GPU: this rank's share of its replicas'.
        activations: What is kept from forward to backward passes.
        layer: What one layer's backward pass needs beside it.
        logits: What the logprobs need in their turn: chunks of logits, the output layer's gradient.
        offloaded: Moments on the host, where they are offloaded.
        snapshot: The copy on the host that a checkpoint under way writes: masters and moments.
        reference: The frozen reference's parameters on the host, where the loss asks for one.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    layer: int
    logits: int
    offloaded: int
    snapshot: int
    reference: int

    @property
    def host(self) -> int:
        """On the host, while a checkpoint is under way."""
        return self.offloaded + self.snapshot + self.reference

    @property
    def device(self) -> int:
        """On the GPU, with the reserve; the logprobs are through when the layers' backward pass begins."""
        held = self.weights + self.gradients + self.optimizer + self.activations
        return held + max(self.layer, self.logits) + RESERVE_BYTES


class HostMemory(NamedTuple):
    """Bytes of a node's own memory that are known: what its processes need beside is not.

    Attributes:
        offloaded: The optimizer's state of its ranks.
        checkpoint: The copies of its ranks that a checkpoint under way writes.
        reference: The reference's parameters of its ranks.
        published: What its ranks keep of the weights for those who pull.
        pulled: The copies of its generators.
    """

    offloaded: int
    checkpoint: int
    reference: int
    published: int
    pulled: int


class AssumedDelta(NamedTuple):
    """What a version is assumed to change.

    Attributes:
        changed_share: Share of the elements.
        bytes_share: Bytes of all parts' deltas, over those of the weights.
    """

    changed_share: float
    bytes_share: float


# What updates by Adam at a rate of 1e-6 change in bfloat16, by their number (python -m tests.bench weights.codec).
_BFLOAT16_DELTAS = {1: AssumedDelta(0.011, 0.0073), 4: AssumedDelta(0.021, 0.014), 8: AssumedDelta(0.036, 0.022)}
_FLOAT32_DELTA = AssumedDelta(1.0, 0.58)  # the same, of one step of the tiny model


class EngineMemory(NamedTuple):
    """Bytes of one GPU of an engine."""

    weights: int
    kv_cache: int


def rank_memory(config: Config, shape: ModelShape, stage: int) -> RankMemory:
    """Of the ranks of a pipeline stage."""
    learner, parallel = config.learner, config.learner.parallel
    item = ITEM_BYTES[learner.dtype]
    owned, held = rank_parameters(shape, parallel, stage), held_bytes(config, shape, stage)
    replicas = parallel.data * parallel.context
    expert_replicas = parallel.num_stage_ranks // (parallel.expert * parallel.expert_tensor)
    stepped = -(-owned.dense // replicas) + -(-owned.experts // expert_replicas)
    masters = stepped * _MASTER_BYTES if item == 2 else 0  # float32 parameters are their own
    moments = stepped * _MOMENT_BYTES
    offloaded = learner.offload_optimizer
    return RankMemory(
        weights=owned.total * item,
        gradients=owned.total * _GRADIENT_BYTES,
        optimizer=masters + (0 if offloaded else moments),
        activations=held.activations,
        layer=held.layer,
        logits=logits_bytes(config, shape) if stage == parallel.pipeline - 1 else 0,
        offloaded=moments if offloaded else 0,
        snapshot=stepped * (_MASTER_BYTES + _MOMENT_BYTES),
        reference=owned.total * item if config.loss.kl_coefficient > 0 else 0,
    )


def logits_bytes(config: Config, shape: ModelShape) -> int:
    """Of the logprobs: chunks of logits in float32 forward; one, the output layer's gradient and its sum back.

    Forward there are three at a time, or two of them where ranks share the vocabulary and work in place.
    """
    item = ITEM_BYTES[config.learner.dtype]
    rows = shape.vocab_size // config.learner.parallel.tensor
    tokens = config.learner.max_tokens_per_microbatch // config.learner.parallel.context
    num_chunks = max(1, tokens // max(_MIN_CHUNK_ROWS, _CHUNK_ELEMENTS // rows))
    chunk = -(-tokens // num_chunks) * rows
    copy = item if item == 2 else 0  # in the weights' dtype
    chunks = 3 if config.learner.parallel.tensor == 1 else 2
    return max(chunks * 4 * chunk, (4 + copy) * chunk + (4 + item) * rows * shape.hidden_size)


def engine_memory(config: Config, shape: ModelShape) -> EngineMemory:
    """Of each GPU of an engine."""
    generator, parallel = config.generator, config.generator.parallel
    item = ITEM_BYTES[generator.dtype]
    heads = max(1, shape.num_key_value_heads // parallel.tensor)
    token_bytes = 2 * shape.num_hidden_layers * heads * shape.channels * item
    tokens = generator.max_total_tokens // parallel.data
    return EngineMemory(engine_parameters(shape, parallel) * item, tokens * token_bytes)


def update_bytes(config: Config, shape: ModelShape) -> int:
    """Of one published version: all weights, in the learner's dtype."""
    return model_parameters(shape) * ITEM_BYTES[config.learner.dtype]


def checkpoint_bytes(shape: ModelShape) -> int:
    """Of one checkpoint on disk: weights and both moments, in float32."""
    return model_parameters(shape) * (_MASTER_BYTES + _MOMENT_BYTES)


def published_copies(config: Config) -> float:
    """How many times the weights are in the memory of the learner's nodes.

    They are what is kept, the newest version, the one in the making, and its delta.
    """
    return config.weights.retention + 2 + assumed_delta(config).bytes_share


def anchor_interval(config: Config) -> int:
    """How many versions there are from one that is kept whole to the next."""
    room = (config.weights.retention - 2) / assumed_delta(config).bytes_share
    return min(config.weights.anchor_every, int(room) + 1)


def pulled_copies(config: Config) -> float:
    """How many times the weights are in the memory of a generator: its copy, and deltas on their way.

    These are one for who follows, and those that a joiner pulls ahead of the anchor.
    """
    share = assumed_delta(config).bytes_share
    return 1 + max(share, min((anchor_interval(config) - 1) * share, AHEAD_SHARE))


def assumed_delta(config: Config) -> AssumedDelta:
    """What a version is assumed to change."""
    if config.learner.dtype == "float32":
        return _FLOAT32_DELTA
    known = [num for num in _BFLOAT16_DELTAS if num >= config.updates_per_step]
    return _BFLOAT16_DELTAS[min(known, default=max(_BFLOAT16_DELTAS))]


def host_memory(config: Config, shape: ModelShape, placement: Placement) -> list[HostMemory]:
    """Of each node; ranks hand out like shares of the weights."""
    size_bytes = update_bytes(config, shape)
    nodes: list[HostMemory] = []
    for node in range(placement.num_nodes):
        ranks = [rank_memory(config, shape, rank.pipeline) for rank in placement.ranks if rank.node == node]
        nodes.append(
            HostMemory(
                offloaded=sum(rank.offloaded for rank in ranks),
                checkpoint=sum(rank.snapshot for rank in ranks),
                reference=sum(rank.reference for rank in ranks),
                published=int(published_copies(config) * size_bytes * len(ranks) / len(placement.ranks)),
                pulled=int(pulled_copies(config) * size_bytes) * sum(e.node == node for e in placement.engines),
            )
        )
    return nodes


def check_fits(config: Config, shape: ModelShape) -> None:
    """Checks that ranks, engines and hosts have the memory that they need; nothing where no GPUs are assigned.

    Raises:
        ConfigError: One does not.
    """
    machines, generator = config.placement, config.generator
    if machines.gpus_per_node == 0:
        return
    placement = place(config)
    for stage in range(config.learner.parallel.pipeline):
        memory = rank_memory(config, shape, stage)
        if memory.device > machines.gpu_memory_gib * GIB:
            first = next(rank.rank for rank in placement.ranks if rank.pipeline == stage)
            raise ConfigError(
                f"learner rank {first}: found {parts(memory)} = {readable(memory.device)}, expected at most "
                f"placement.gpu_memory_gib = {machines.gpu_memory_gib:g}"
            )
    engine = engine_memory(config, shape)
    allowed = generator.memory_share * machines.gpu_memory_gib * GIB
    if sum(engine) > allowed:
        raise ConfigError(
            f"generator-0: found weights {readable(engine.weights)} + KV cache {readable(engine.kv_cache)} = "
            f"{readable(sum(engine))} on each GPU, expected at most generator.memory_share * placement.gpu_memory_gib "
            f"= {readable(allowed)}: fewer generator.max_total_tokens than {generator.max_total_tokens:,}, or more "
            "generator.parallel.tensor"
        )
    for node, memory in enumerate(host_memory(config, shape, placement)):
        if sum(memory) > machines.host_memory_gib * GIB:
            raise ConfigError(
                f"node {node}: found {host_parts(memory)} = {readable(sum(memory))}, expected at most "
                f"placement.host_memory_gib = {machines.host_memory_gib:g}"
            )


def parts(memory: RankMemory) -> str:
    """The parts of a rank's memory, for people."""
    names = ("weights", "gradients", "optimizer", "activations")
    sizes = [f"{name} {readable(getattr(memory, name))}" for name in names]
    work = f"the larger of one layer {readable(memory.layer)} and logits {readable(memory.logits)}"
    return " + ".join([*sizes, work, f"reserve {readable(RESERVE_BYTES)}"])


def host_parts(memory: HostMemory) -> str:
    """The parts of a node's memory, for people."""
    names = {
        "offloaded": "optimizer state",
        "checkpoint": "a checkpoint under way",
        "reference": "reference",
        "published": "published weights",
        "pulled": "pulled weights",
    }
    sizes = [f"{words} {readable(getattr(memory, name))}" for name, words in names.items() if getattr(memory, name)]
    return " + ".join(sizes)


def rank_host_parts(memory: RankMemory) -> str:
    """The parts of what a rank has on the host, for people."""
    names = {
        "offloaded": "moments",
        "snapshot": "the copy that a checkpoint under way writes",
        "reference": "reference",
    }
    return " + ".join(f"{words} {readable(size)}" for name, words in names.items() if (size := getattr(memory, name)))


def readable(size_bytes: float) -> str:
    """A size for people."""
    unit, name = (GIB, "GiB") if abs(size_bytes) >= 0.1 * GIB else (MIB, "MiB")
    return f"{size_bytes / unit:.2f} {name}"
