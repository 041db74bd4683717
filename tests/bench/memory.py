"""What an update of a small model holds in memory, beside the estimate that the dry run prints."""

import json
import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.report import Figure

KINDS = ("qwen2", "qwen3", "qwen3-moe")
RECOMPUTE = ("none", "selective", "full")
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 48}
DIVISIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2-sp": ("qwen3", {"tensor": 2, "sequence": True}),
    "dp2": ("qwen3", {"data": 2}),
    "moe-ep2": ("qwen3-moe", {"data": 2, "expert": 2}),
}
LENGTHS = [100] * 16
UPDATES = 9  # of several replicas: the least counts, since what they send each other is freed as their clocks have it
MIB = 1 << 20


class Measured(NamedTuple):
    """Bytes beside what is estimated: of what stays, of a checkpoint's copy, of the peak above them in an update."""

    weights: int
    gradients: int
    optimizer: int
    snapshot: int
    peak: int


def run() -> list[Figure]:
    """Each kind of model with each choice of recompute, in a process of its own; then divisions over two ranks."""
    figures: list[Figure] = []
    for kind in KINDS:
        for recompute in RECOMPUTE:
            measured, estimated = _apart(kind, recompute)
            name = f"{kind}, recompute {recompute}: activations and logits at their peak"
            beside = f"estimate {estimated.peak / MIB:.1f} MiB, {estimated.peak / measured.peak:.3f} of it"
            figures.append(Figure(name, measured.peak / MIB, "MiB", beside))
    for division, (kind, parallel) in DIVISIONS.items():
        with tempfile.TemporaryDirectory() as directory:
            ranks = measure_ranks(Path(directory), kind, 2, **parallel)
        held, estimate = sum(m.peak for m, _ in ranks), sum(e.peak for _, e in ranks)
        beside = f"estimate {estimate / MIB:.1f} MiB, {estimate / held:.3f} of it"
        figures.append(Figure(f"{kind}, {division}: the same, of two ranks together", held / MIB, "MiB", beside))
    return figures


def measure(
    directory: Path, kind: str, recompute: str, dtype: str = "float32", **changes: int
) -> tuple[Measured, Measured]:
    """What is measured and what is estimated; the directory gets the model, of `SIZES` with `changes`."""
    return _beside(_build(directory, kind, dtype, **changes), recompute, dtype)


def measure_ranks(directory: Path, kind: str, num_ranks: int, **parallel: Any) -> list[tuple[Measured, Measured]]:
    """The same of each rank of a division, over gloo; the directory gets the model."""
    import torch.multiprocessing as processes

    _build(directory / "model", kind, "float32")
    processes.spawn(_rank, args=(num_ranks, directory, parallel), nprocs=num_ranks)
    found = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return [(Measured(*measured), Measured(*estimated)) for measured, estimated in found]


def _rank(rank: int, num_ranks: int, directory: Path, parallel: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{directory / 'store'}", rank=rank, world_size=num_ranks)
    beside = _beside(directory / "model", "selective", "float32", **parallel)
    (directory / f"{rank}.json").write_text(json.dumps(beside))
    dist.destroy_process_group()


def _build(directory: Path, kind: str, dtype: str, **changes: int) -> Path:
    import torch

    from tests.learner.megatron import tiny

    sizes = SIZES | ({"head_dim": 32} if kind != "qwen2" else {}) | (EXPERTS if "moe" in kind else {}) | changes
    return tiny.build(directory, kind, dtype=getattr(torch, dtype), **sizes)


def _beside(directory: Path, recompute: str, dtype: str, **parallel: Any) -> tuple[Measured, Measured]:
    """What this rank's second update holds, and what is estimated for it."""
    from common.shape import read_shape
    from launch.estimate import rank_memory
    from learner.megatron.policy import Policy
    from tests.learner.megatron import tiny

    micros = tiny.micro_batches(LENGTHS)
    assert len(micros) == 1
    learner = {"dtype": dtype, "recompute": recompute, "max_tokens_per_microbatch": micros[0].num_tokens}
    config = tiny.config(
        directory,
        learner=learner | {"parallel": parallel},
        data={"train": "x", "max_prompt_tokens": 64},
        sampling={"max_tokens": 64},
    )
    policy = Policy(config)
    policy.update(micros, tiny.masked_mean_loss)
    num_updates = 1 if policy.share.num_ranks == 1 else UPDATES
    peak = min(_peak_bytes(lambda: policy.update(micros, tiny.masked_mean_loss)) for _ in range(num_updates))
    memory = rank_memory(config, read_shape(directory), 0)
    transient = memory.activations + max(memory.layer, memory.logits)
    return _held(policy, peak), Measured(memory.weights, memory.gradients, memory.optimizer, memory.snapshot, transient)


def _held(policy: Any, peak: int) -> Measured:
    """The parameters, as many tensors as they may be, their gradients, and this rank's share of the rest."""
    from learner.sharded import Sharded

    optimizers: list[Any] = policy._optimizer.megatron.chained_optimizers
    parameters = [p for optimizer in optimizers for buffer in optimizer.buffers for p in buffer.params]
    state = [t for part in optimizers for values in part.optimizer.state.values() for t in values.values()]
    masters = [t for part in optimizers for group in part.shard_fp32_from_float16_groups for t in group]
    copied = policy.snapshot().values()
    return Measured(
        weights=sum(parameter.nbytes for parameter in parameters),
        gradients=sum(parameter.main_grad.nbytes for parameter in parameters),
        optimizer=sum(tensor.nbytes for tensor in [*state, *masters] if tensor is not None),
        snapshot=sum(part.nbytes for entry in copied if isinstance(entry, Sharded) for part in entry._parts.values()),
        peak=peak,
    )


def _peak_bytes(work: Any) -> int:
    """The most bytes that live at once above what lived before, as torch's CPU allocator tells."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _apart(kind: str, recompute: str) -> tuple[Measured, Measured]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_measure, args=(there, kind, recompute))
    child.start()
    there.close()
    result: tuple[Measured, Measured] = here.recv()
    child.join()
    return result


def _measure(pipe: Connection, kind: str, recompute: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        pipe.send(measure(Path(directory), kind, recompute))
