"""What an update of a small model holds in memory, beside the estimate that the dry run prints.

Bytes of living tensors are the same on every machine, and tests hold the estimate to them. Resident memory depends on
the processor's kernels, and is a figure of the benchmark alone.
"""

import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.bench.report import Figure
from tests.live_bytes import live_bytes

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
UPDATES = 5
MIB = 1 << 20


@dataclass(frozen=True)
class Job:
    """A model and how it is trained.

    Attributes:
        kind: Of the model; it has `SIZES`.
        recompute: Of the learner.
        dtype: Of the learner and the model.
        parallel: The division over ranks.
        changes: Of `SIZES`.
    """

    kind: str
    recompute: str = "selective"
    dtype: str = "float32"
    parallel: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)


ALONE = {f"{kind}, recompute {recompute}": Job(kind, recompute) for kind in KINDS for recompute in RECOMPUTE}
ON_TWO = {
    "qwen3, tp2-sp": Job("qwen3", parallel={"tensor": 2, "sequence": True}),
    "qwen3, dp2": Job("qwen3", parallel={"data": 2}),
    "qwen3-moe, ep2": Job("qwen3-moe", parallel={"data": 2, "expert": 2}),
}


class Held(NamedTuple):
    """Bytes of what stays, of a checkpoint's copy, and of the peak above them in an update."""

    weights: int
    gradients: int
    optimizer: int
    snapshot: int
    peak: int


class Rank(NamedTuple):
    """What a rank holds as its tensors tell and as the estimate says; its peak as the kernel tells, where asked for."""

    measured: Held
    estimated: Held
    resident_peak: int


def run() -> list[Figure]:
    """Each kind of model with each choice of recompute on one rank, then divisions over two."""
    figures: list[Figure] = []
    for num_ranks, jobs in ((1, ALONE), (2, ON_TWO)):
        with tempfile.TemporaryDirectory() as directory:
            found = measure(Path(directory), jobs, num_ranks, resident=True)
        for name, ranks in found.items():
            living, estimate = total_peak(ranks)
            beside = (
                f"living tensors {living / MIB:.1f} MiB, estimate {estimate / MIB:.1f} MiB: {estimate / living:.3f}"
            )
            of = f"{num_ranks} rank{'s together' * (num_ranks > 1)}, resident"
            resident = sum(rank.resident_peak for rank in ranks)
            figures.append(Figure(f"{name}: activations and logits at their peak, {of}", resident / MIB, "MiB", beside))
    return figures


def total_peak(ranks: list[Rank]) -> tuple[int, int]:
    """The peaks of ranks together, as measured and as estimated."""
    return sum(rank.measured.peak for rank in ranks), sum(rank.estimated.peak for rank in ranks)


def measure(directory: Path, jobs: dict[str, Job], num_ranks: int, *, resident: bool = False) -> dict[str, list[Rank]]:
    """What is measured and what is estimated for each rank of each job, over gloo; the directory gets the models.

    Where resident memory is asked for, the processes are new ones in which each larger block of it goes back to the
    kernel when it is freed, so that it is what lives.
    """
    from tests.ranks import run_ranks

    for name, job in jobs.items():
        _build(directory / name, job)
    with pytest.MonkeyPatch.context() as environment:
        if resident:
            environment.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 16))
            environment.setenv("MALLOC_TRIM_THRESHOLD_", str(1 << 16))
        start_method = "spawn" if resident else "forkserver"
        run_ranks(num_ranks, directory, _measure, directory, jobs, resident, start_method=start_method)
    found = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return {name: [Rank(Held(*of[name][0]), Held(*of[name][1]), of[name][2]) for of in found] for name in jobs}


def _measure(directory: Path, jobs: dict[str, Job], resident: bool) -> None:
    import torch.distributed as dist

    found = {name: _update(directory / name, job, resident) for name, job in jobs.items()}
    (directory / f"{dist.get_rank()}.json").write_text(json.dumps(found))


def _build(directory: Path, job: Job) -> None:
    import torch

    from tests.learner.megatron import tiny

    experts = EXPERTS if "moe" in job.kind else {}
    sizes = SIZES | ({"head_dim": 32} if job.kind != "qwen2" else {}) | experts | job.changes
    tiny.build(directory, job.kind, dtype=getattr(torch, job.dtype), **sizes)


def _update(directory: Path, job: Job, resident: bool) -> Rank:
    """What updates of this rank hold, and what is estimated for it."""
    from common.shape import read_shape
    from launch.estimate import rank_memory
    from learner.megatron.policy import Policy
    from tests.learner.megatron import tiny

    micros = tiny.micro_batches(LENGTHS)
    assert len(micros) == 1
    learner = {"dtype": job.dtype, "recompute": job.recompute, "max_tokens_per_microbatch": micros[0].num_tokens}
    config = tiny.config(
        directory,
        learner=learner | {"parallel": job.parallel},
        data={"train": "x", "max_prompt_tokens": 64},
        sampling={"max_tokens": 64},
    )
    policy = Policy(config)

    def update() -> None:
        policy.update(micros, tiny.masked_mean_loss)

    def update_twice() -> None:  # what Megatron's layers keep of one update lives until the next
        update()
        update()

    live = live_bytes(update_twice)
    memory = rank_memory(config, read_shape(directory), 0)
    transient = memory.activations + max(memory.layer, memory.logits)
    estimated = Held(memory.weights, memory.gradients, memory.optimizer, memory.snapshot, transient)
    return Rank(_held(policy, live.peak), estimated, live.left + _resident_peak(update) if resident else 0)


def _held(policy: Any, peak: int) -> Held:
    """The parameters, as many tensors as they may be, their gradients, and this rank's share of the rest."""
    from learner.sharded import Sharded

    optimizers: list[Any] = policy._optimizer.megatron.chained_optimizers
    parameters = [p for optimizer in optimizers for buffer in optimizer.buffers for p in buffer.params]
    state = [t for part in optimizers for values in part.optimizer.state.values() for t in values.values()]
    masters = [t for part in optimizers for group in part.shard_fp32_from_float16_groups for t in group]
    copied = policy.snapshot().values()
    return Held(
        weights=sum(parameter.nbytes for parameter in parameters),
        gradients=sum(parameter.main_grad.nbytes for parameter in parameters),
        optimizer=sum(tensor.nbytes for tensor in [*state, *masters] if tensor is not None),
        snapshot=sum(part.nbytes for entry in copied if isinstance(entry, Sharded) for part in entry._parts.values()),
        peak=peak,
    )


def _resident_peak(work: Callable[[], Any]) -> int:
    """The most memory that is resident at once above what was before, as the kernel tells, in the least of some times.

    The allocator's own reports miss what gloo's threads free.
    """
    peaks: list[int] = []
    for _ in range(UPDATES):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = _status_bytes("VmRSS")
        work()
        peaks.append(_status_bytes("VmHWM") - before)
    return min(peaks)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
