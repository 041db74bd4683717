"""How long an update takes on a CPU."""

import time
from pathlib import Path

import torch

from learner.megatron.policy import Policy
from tests.learner.megatron import tiny


def test_an_update_on_hundreds_of_short_sequences_takes_well_under_a_second(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    policy = Policy(tiny.config(tiny.build(tmp_path, "qwen3-tied", **sizes)))
    micros = tiny.micro_batches([7 + i % 5 for i in range(256)], max_tokens=8192)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fastest = min(_seconds(policy, micros) for _ in range(4))
    finally:
        torch.set_num_threads(threads)
    assert fastest < 0.4


def _seconds(policy: Policy, micros: list[tiny.MicroBatch]) -> float:
    start = time.perf_counter()
    policy.update(micros, tiny.masked_mean_loss)
    return time.perf_counter() - start
