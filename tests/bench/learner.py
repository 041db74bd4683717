"""The learner beside transformers on the same sequences, and the share of a step that is Python outside Megatron.

Seconds are processor time of one thread, so that other work on the machine does not count; rounds alternate, and each
figure is the median over them.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.bench.report import Figure

ROUNDS = 9
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
HIDDEN_128: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
TINY = HIDDEN_128 | {"vocab_size": 64, "num_hidden_layers": 2}
SMALL = HIDDEN_128 | {"vocab_size": 1024, "num_hidden_layers": 4}


class Job(NamedTuple):
    """A model, and the lengths of the sequences of an update."""

    name: str
    sizes: dict[str, Any]
    lengths: list[int]


_SHORT = np.random.default_rng(0).integers(8, 11, 64).tolist()
_RAGGED = np.random.default_rng(0).integers(32, 257, 32).tolist()
JOBS = (
    Job("the tiny model (2 layers, 64 sequences of 8 to 10 tokens)", TINY, _SHORT),
    Job("hidden size 128, 4 layers, 32 sequences of 32 to 256 tokens", SMALL, _RAGGED),
)


def run() -> list[Figure]:
    """Each job dense and with experts, then the tiny layout's step, each in a process of its own."""
    figures: list[Figure] = []
    for job in JOBS:
        for kind, sizes in (("dense", job.sizes), ("8 experts", job.sizes | EXPERTS)):
            ours, theirs, way = _apart(_compare, sizes, job.lengths)
            beside = f"transformers {theirs:,.0f} tokens/s at its best, {way}"
            figures.append(Figure(f"{job.name}, {kind}: forward and backward", ours, "tokens/s", beside))
            figures.append(Figure("the same, of transformers'", ours / theirs, "x"))
    for kind, sizes in (("dense", TINY), ("8 experts", TINY | EXPERTS)):
        parts = _apart(_split_step, sizes)
        whole = parts.pop("whole")
        named = ", ".join(f"{name} {seconds / whole:.1%}" for name, seconds in parts.items())
        name = f"a step of the local layout, {kind}: Python outside Megatron"
        figures.append(Figure(name, 100 * sum(parts.values()) / whole, "% of it", f"{named}; {1000 * whole:.0f} ms"))
    return figures


def _compare(directory: Path, sizes: dict[str, Any], lengths: list[int]) -> tuple[float, float, str]:
    """Tokens/s here and of the fastest way in transformers, and which that is."""
    from functools import partial

    from learner.megatron.policy import Policy
    from tests.learner.megatron import tiny

    kind = "qwen3-moe" if "num_experts" in sizes else "qwen3"
    tiny.build(directory, kind, **sizes)
    micros = tiny.micro_batches(lengths)
    policy: Any = Policy(tiny.config(directory))
    loss = _sum_of_logprobs()

    def ours() -> None:
        for piece in policy._wrapped:
            piece.zero_grad_buffer()
        policy._schedule(micros, partial(policy._train_step, loss=loss), forward_only=False)

    sequences = [tokens for micro in micros for tokens in tiny.sequences_of(micro)]
    ways = {"ours": ours} | {
        f"{batches}, experts {experts}" if "moe" in kind else batches: _transformers(directory, kind, experts, batch)
        for experts in (("grouped_mm", "eager") if "moe" in kind else ("eager",))
        for batches, batch in _batches(sequences).items()
    }
    seconds = _alternate(ways)
    own = seconds.pop("ours")
    way = min(seconds, key=seconds.__getitem__)
    return sum(lengths) / own, sum(lengths) / seconds[way], way


def _sum_of_logprobs() -> Callable[..., Any]:
    return lambda _micro, logprobs, _entropy: -logprobs.sum()


def _batches(sequences: list[Any]) -> dict[str, list[list[Any]]]:
    """The sequences as transformers may take them, by name; longest first, so that neighbours have like lengths."""
    return {
        "padded, all at once": [sequences],
        "padded, by lengths in batches of 8": [sequences[i : i + 8] for i in range(0, len(sequences), 8)],
        "one by one": [[sequence] for sequence in sequences],
    }


def _transformers(directory: Path, kind: str, experts: str, batches: list[list[Any]]) -> Callable[[], None]:
    """Forward and backward of the sum of all logprobs in transformers; padding has a mask where there is any."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    from tests.learner.megatron import tiny

    options = {"experts_implementation": experts} if "moe" in kind else {}
    model = tiny.reference_class(kind).from_pretrained(directory, dtype=torch.float32, **options)
    inputs: list[tuple[Any, Any, Any]] = []
    for batch in batches:
        token_ids = pad_sequence(batch, batch_first=True)
        there = pad_sequence([torch.ones_like(tokens) for tokens in batch], batch_first=True)
        labels = token_ids.masked_fill(there == 0, -100)[:, 1:].reshape(-1)
        inputs.append((token_ids, None if bool(there.all()) else there, labels))

    def work() -> None:
        model.zero_grad()
        for token_ids, mask, labels in inputs:
            logits = model(token_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            cross_entropy(logits.reshape(-1, logits.shape[-1]), labels, reduction="sum").backward()

    return work


def _alternate(ways: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of processor time of each, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, work in ways.items():
            began = time.process_time()
            work()
            seconds[name].append(time.process_time() - began)
    return {name: float(np.median(each[1:])) for name, each in seconds.items()}


def _split_step(directory: Path, sizes: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a step of 256 completions in 4 updates, and of each part of it that is not Megatron's."""
    from common.versions import Lineages
    from learner.step import train_step
    from tests.bench.clocked import ClockedPolicy, groups
    from tests.learner.megatron import tiny

    tiny.build(directory, "qwen3-moe" if "num_experts" in sizes else "qwen3", **sizes)
    changes = {"groups_per_step": 16, "group_size": 16, "updates_per_step": 4, "max_staleness": 4}
    config = tiny.config(directory, **changes, sampling={"max_tokens": 16})
    policy = ClockedPolicy(config)
    rows: list[dict[str, float]] = []
    for number in range(ROUNDS + 1):
        batch, version = groups(number, config)
        policy.parts.clear()
        began = time.process_time()
        train_step(policy, batch, config, version, Lineages())
        whole = time.process_time() - began - policy.parts["twice"]
        rows.append({"whole": whole} | policy.of_a_step(whole))
    return {name: float(np.median([row[name] for row in rows[1:]])) for name in rows[0]}


def _apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own with one thread, given a directory and the arguments."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_send, args=(there, work, arguments))
    child.start()
    there.close()
    result = here.recv()
    child.join()
    return result


def _send(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        pipe.send(work(Path(directory), *arguments))
