"""Who runs where: each learner rank and each engine on GPUs of its own, node by node."""

from typing import NamedTuple

from common.config import Config
from common.learning import ParallelConfig


class Rank(NamedTuple):
    """One learner rank: its place, and its coordinates in Megatron's groups.

    Attributes:
        rank: In the learner's world.
        node: Of the run, from 0.
        gpu: Of the node.
        tensor: Among the ranks that share matrices.
        context: Among those that share sequences.
        data: Replica.
        pipeline: Stage.
        expert_tensor: Among the ranks that share an expert's matrices.
        expert: Among those that share the experts of a layer.
        expert_data: Replica of the experts.
    """

    rank: int
    node: int
    gpu: int
    tensor: int
    context: int
    data: int
    pipeline: int
    expert_tensor: int
    expert: int
    expert_data: int


class Engine(NamedTuple):
    """One generator's engine, within a node."""

    name: str
    node: int
    gpus: tuple[int, ...]


class Placement(NamedTuple):
    """All of a run.

    Attributes:
        ranks: In order.
        engines: In order.
        num_nodes: How many it takes.
    """

    ranks: tuple[Rank, ...]
    engines: tuple[Engine, ...]
    num_nodes: int

    @property
    def num_gpus(self) -> int:
        """Of all ranks and engines."""
        return len(self.ranks) + sum(len(engine.gpus) for engine in self.engines)


def place(config: Config) -> Placement:
    """The learner's ranks on the first GPUs, engines on the next; an engine begins a node where it would cross one.

    `placement.gpus_per_node` must not be 0.
    """
    gpus, needed = config.placement.gpus_per_node, config.generator.parallel.num_gpus
    assert gpus >= needed
    ranks = rank_places(config.learner.parallel, gpus)
    engines: list[Engine] = []
    free = len(ranks)
    for index in range(config.generator.count):
        if free % gpus + needed > gpus:
            free = -(-free // gpus) * gpus
        first = free % gpus
        engines.append(Engine(f"generator-{index}", free // gpus, tuple(range(first, first + needed))))
        free += needed
    return Placement(ranks, tuple(engines), -(-free // gpus))


def rank_places(parallel: ParallelConfig, gpus: int) -> tuple[Rank, ...]:
    """Of each rank, with `gpus` of them on a node."""
    return tuple(_rank(parallel, number, gpus) for number in range(parallel.num_ranks))


def _rank(parallel: ParallelConfig, number: int, gpus: int) -> Rank:
    """Megatron's order: tensor ranks are neighbours, then context, data, and pipeline stages last."""
    pipeline, inner = divmod(number, parallel.num_stage_ranks)
    outer, tensor = divmod(inner, parallel.tensor)
    data, context = divmod(outer, parallel.context)
    outer, expert_tensor = divmod(inner, parallel.expert_tensor)
    expert_data, expert = divmod(outer, parallel.expert)
    node, gpu = divmod(number, gpus)
    return Rank(number, node, gpu, tensor, context, data, pipeline, expert_tensor, expert, expert_data)
