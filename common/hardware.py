"""The section of a configuration that says what machines there are."""

from common.sections import Natural, Positive, Section

MIB, GIB = 1 << 20, 1 << 30


class PlacementConfig(Section):
    """The machines. Learner ranks and engines have GPUs of their own; how many nodes that takes follows.

    Attributes:
        gpus_per_node: Of each node. 0 gives no process a GPU of its own: each takes what it finds, or the CPU.
        gpu_memory_gib: Of each GPU.
        host_memory_gib: Of each node: what is offloaded and published and a checkpoint under way must fit.
    """

    gpus_per_node: Natural = 0
    gpu_memory_gib: Positive = 80.0
    host_memory_gib: Positive = 1024.0
