"""The frozen reference: always the starting model, in the place of the weights only while it is asked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from common.learning import ParallelConfig
from common.shape import read_shape
from common.versions import Lineages, Version
from launch.parameters import rank_parameters
from learner.megatron.policy import Policy
from learner.sharded import write
from learner.step import train_step
from tests.learner.megatron import tiny
from tests.learner.steps import groups

KL = {"kl_coefficient": 0.1}
LENGTHS = [5, 9, 9, 12, 2, 30]


def test_the_reference_is_the_starting_model_whatever_was_learned(tmp_path: Path) -> None:
    for kind in ("qwen2-tied", "qwen3-moe"):
        tiny.build(tmp_path / kind, kind)
        policy = Policy(tiny.config(tmp_path / kind, loss=KL, optimizer={"lr": 1e-2}))
        micros = tiny.micro_batches(LENGTHS, max_tokens=40)
        at_start = policy.logprobs(micros)
        for _ in range(3):
            policy.update(micros, tiny.masked_mean_loss)
        assert not torch.equal(policy.logprobs(micros[:1])[0], at_start[0])
        found = policy.reference_logprobs(micros)
        assert len(found) == len(micros) > 1
        assert all(torch.equal(a, b) for a, b in zip(found, at_start, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asking_the_reference_leaves_the_training_as_it_was_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3", dtype=dtype)
    options = {"learner": {"dtype": str(dtype).removeprefix("torch.")}, "optimizer": {"lr": 1e-2}}
    asked, left_alone = Policy(tiny.config(tmp_path, loss=KL, **options)), Policy(tiny.config(tmp_path, **options))
    micros = tiny.micro_batches(LENGTHS)
    for _ in range(3):
        asked.reference_logprobs(micros)
        for policy in (asked, left_alone):
            policy.update(micros, tiny.masked_mean_loss)
        expected = dict(left_alone.export())
        assert all(torch.equal(tensor, expected[name]) for name, tensor in asked.export())


def test_an_error_in_between_puts_the_weights_back(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3")
    policy = Policy(tiny.config(tmp_path, loss=KL, optimizer={"lr": 1e-2}))
    policy.update(tiny.micro_batches(LENGTHS), tiny.masked_mean_loss)
    before = {name: tensor.clone() for name, tensor in policy.export()}
    with pytest.raises(AttributeError):
        policy.reference_logprobs([None])  # type: ignore[list-item]
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.export())


def test_a_resumed_policy_has_the_reference_of_the_first_start(tmp_path: Path) -> None:
    tiny.build(tmp_path / "model", "qwen3")
    config = tiny.config(tmp_path / "model", loss=KL, optimizer={"lr": 1e-2})
    micros = tiny.micro_batches(LENGTHS)
    policy = Policy(config)
    at_start = policy.logprobs(micros[:1])[0]
    policy.update(micros, tiny.masked_mean_loss)
    write(tmp_path / "checkpoint", policy.snapshot(), None)
    resumed = Policy(config)
    resumed.load(tmp_path / "checkpoint")
    assert torch.equal(resumed.logprobs(micros[:1])[0], policy.logprobs(micros[:1])[0])
    assert torch.equal(resumed.reference_logprobs(micros)[0], at_start)


def test_a_run_starts_at_its_reference_and_the_divergence_is_measured_from_there(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3")

    def run(num_steps: int) -> list[float]:
        config = tiny.config(
            tmp_path,
            groups_per_step=8,
            group_size=4,
            updates_per_step=1,
            steps=num_steps,
            sampling={"temperature": 1.0, "max_tokens": 8},
            loss=KL | {"clip_low": 0.03, "clip_high": 0.04},
        )
        policy = Policy(config)
        return [train_step(policy, groups(), config, Version(0, 2 + n), Lineages())["kl"] for n in range(num_steps)]

    divergences = run(3)
    assert divergences[0] == 0
    assert 0 < divergences[1] < divergences[2]
    assert np.isfinite(divergences).all()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_its_cost_is_told_at_start_and_is_what_the_dry_run_says(kind: str, tmp_path: Path) -> None:
    tiny.build(tmp_path, kind)
    config = tiny.config(tmp_path, loss=KL, groups_per_step=3, updates_per_step=3, group_size=5)
    with capture_logs() as events:
        Policy(config)
        Policy(tiny.config(tmp_path))
    (told,) = [event for event in events if event["event"] == "reference_model"]
    assert told["extra_forward_sequences_per_step"] == 15
    assert told["host_bytes_per_rank"] == 4 * rank_parameters(read_shape(tmp_path), ParallelConfig(), 0).total
