"""Logprobs of a long micro-batch over a large vocabulary: peak memory, forward and backward, beside whole logits."""

import multiprocessing
import resource
import time
from multiprocessing.connection import Connection

import psutil

from tests.bench.report import Figure

NUM_TOKENS, VOCAB, HIDDEN = 32_768, 151_936, 64
KIB, GIB = 2**10, 2**30


def run() -> list[Figure]:
    """One forward and one backward pass, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_measure, args=(there,))
    child.start()
    there.close()
    forward_bytes, backward_bytes, forward_s, backward_s = here.recv()
    child.join()
    logits_gib = NUM_TOKENS * VOCAB * 4 / GIB
    size = f"{NUM_TOKENS:,} tokens x {VOCAB:,} vocabulary, float32, hidden size {HIDDEN}"
    return [
        Figure(
            f"{size}: peak memory above hidden states and weight, forward",
            forward_bytes / GIB,
            "GiB",
            f"{logits_gib:.1f} GiB of logits where they are made whole",
        ),
        Figure("the same, backward too, gradients included", backward_bytes / GIB, "GiB"),
        Figure("forward, one thread", forward_s, "s"),
        Figure("backward, one thread", backward_s, "s"),
    ]


def _measure(pipe: Connection) -> None:
    import torch

    from learner.megatron.logprobs import linear_logprobs

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN).mul_(0.1).requires_grad_()
    token_ids = torch.randint(0, VOCAB, (NUM_TOKENS,))
    resident = psutil.Process().memory_info().rss
    began = time.perf_counter()
    logprobs, _ = linear_logprobs(hidden, weight, token_ids, 1.0)
    between, forward_bytes = time.perf_counter(), _peak_bytes() - resident
    logprobs.sum().backward()
    pipe.send((forward_bytes, _peak_bytes() - resident, between - began, time.perf_counter() - between))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
