"""What an update of a small model holds in memory, beside the estimate that the dry run prints."""

import multiprocessing
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
LENGTHS = [100] * 16
MIB = 1 << 20


class Measured(NamedTuple):
    """Bytes beside what is estimated: of the tensors that stay, and of the peak above them during an update."""

    weights: int
    gradients: int
    optimizer: int
    peak: int


def run() -> list[Figure]:
    """Each kind of model with each choice of recompute, in a process of its own."""
    figures: list[Figure] = []
    for kind in KINDS:
        for recompute in RECOMPUTE:
            measured, estimated = _apart(kind, recompute)
            name = f"{kind}, recompute {recompute}: activations and logits at their peak"
            beside = f"estimate {estimated.peak / MIB:.1f} MiB, {estimated.peak / measured.peak:.3f} of it"
            figures.append(Figure(name, measured.peak / MIB, "MiB", beside))
    return figures


def measure(
    directory: Path, kind: str, recompute: str, dtype: str = "float32", **changes: int
) -> tuple[Measured, Measured]:
    """What is measured and what is estimated; the directory gets the model, of `SIZES` with `changes`."""
    import torch

    from common.shape import read_shape
    from launch.estimate import rank_memory
    from learner.megatron.policy import Policy
    from tests.learner.megatron import tiny

    sizes = SIZES | ({"head_dim": 32} if kind != "qwen2" else {}) | (EXPERTS if "moe" in kind else {}) | changes
    tiny.build(directory, kind, dtype=getattr(torch, dtype), **sizes)
    micros = tiny.micro_batches(LENGTHS)
    assert len(micros) == 1
    learner = {"dtype": dtype, "recompute": recompute, "max_tokens_per_microbatch": micros[0].num_tokens}
    config = tiny.config(
        directory, learner=learner, data={"train": "x", "max_prompt_tokens": 64}, sampling={"max_tokens": 64}
    )
    shape, policy = read_shape(directory), Policy(config)
    policy.update(micros, tiny.masked_mean_loss)
    peak = _peak_bytes(lambda: policy.update(micros, tiny.masked_mean_loss))
    optimizers: list[Any] = policy._optimizer.megatron.chained_optimizers
    parameters = [p for optimizer in optimizers for buffer in optimizer.buffers for p in buffer.params]
    state = [t for part in optimizers for values in part.optimizer.state.values() for t in values.values()]
    masters = [t for part in optimizers for group in part.shard_fp32_from_float16_groups for t in group]
    measured = Measured(
        weights=sum(parameter.nbytes for parameter in parameters),
        gradients=sum(parameter.main_grad.nbytes for parameter in parameters),
        optimizer=sum(tensor.nbytes for tensor in [*state, *masters]),
        peak=peak,
    )
    memory = rank_memory(config, shape, 0)
    transient = memory.activations + max(memory.layer, memory.logits)
    return measured, Measured(memory.weights, memory.gradients, memory.optimizer, transient)


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
