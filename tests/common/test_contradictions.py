"""Keys that contradict each other, or of which one has no effect, are refused with one line."""

import math
import re
from typing import Any

import msgspec
import pytest

from common.config import Config
from common.errors import ConfigError

FRESH = {"max_staleness": 0}


def _ranks(**sizes: int) -> dict[str, Any]:
    return {"learner": {"parallel": sizes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learner": {"keep_every": 75}},
            "learner.keep_every: found 75, expected 0 or a multiple of learner.checkpoint",
        ),
        ({"run": {"resume": "auto"}}, "run.resume: found 'auto' with run.name = 'run-%Y%m%d-%H%M%S', where it has no"),
        ({"updates_per_step": 5}, "updates_per_step: found 5, expected a divisor of groups_per_step = 16"),
        ({"model": "x"}, "expected both or neither"),
        ({"data": {"test": "x.jsonl"}}, "without data.train, expected both"),
        ({"sampling": {"temperature": 0.0}}, "sampling.temperature: found 0, expected more"),
        ({"group_size": 2, "lease": {"late": "train_rest"}}, "lease.late: found 'train_rest' with group_size = 2"),
        ({"evaluation": {"num_samples": 2}}, "evaluation.num_samples: found 2"),
        ({"evaluation": {"sampling": {"temperature": 0.0, "top_p": 0.5}}}, "evaluation.sampling.top_p: found 0.5"),
        ({"evaluation": {"sampling": {"temperature": 0.0, "top_k": 5}}}, "evaluation.sampling.top_k: found 5"),
        ({"sampling": {"max_tokens": 9000}}, "learner.max_tokens_per_microbatch: found 8192, expected at least"),
        ({"generator": {"max_total_tokens": 9}}, "generator.max_total_tokens: found 9, expected at least"),
        ({"loss": {"overlong_buffer": 2000}}, "loss.overlong_buffer: found 2000, expected at most sampling.max_tokens"),
        ({"loss": {"overlong_factor": 0.5}}, "loss.overlong_factor: found 0.5 with loss.overlong_buffer = 0"),
        ({**FRESH, "updates_per_step": 1, "loss": {"proximal": "interpolate"}}, "no ratio differs from 1 there"),
        ({"loss": {"clip_low": 1.0}}, "loss.clip_low: found 1, expected less than 1"),
        ({"loss": {"proximal": "generator", "weight_cap": 3.0}}, "loss.weight_cap: found 3"),
        (
            {"loss": {"proximal": "generator", "staleness_clip": 0.2}},
            "loss.staleness_clip: found 0.2 with loss.proximal",
        ),
        ({**FRESH, "loss": {"staleness_clip": 0.2}}, "loss.staleness_clip: found 0.2 with max_staleness = 0"),
        ({**FRESH, "loss": {"narrowing": 0.2}}, "loss.narrowing: found 0.2 with max_staleness = 0"),
        ({"loss": {"narrowing_floor": 0.5}}, "loss.narrowing_floor: found 0.5 with loss.narrowing = 0"),
        ({"loss": {"kl_coefficient": math.inf}}, "loss.kl_coefficient: found inf, expected a finite number"),
        (
            {"steps": 1, "groups_per_step": 1, "updates_per_step": 1, "loss": {"kl_coefficient": 0.1}},
            "loss.kl_coefficient: found 0.1 with steps = 1 and updates_per_step = 1",
        ),
        ({"max_staleness": 1, "loss": {"proximal": "interpolate"}}, "'interpolate' with max_staleness = 1"),
        ({**FRESH, "loss": {"proximal": "interpolate"}}, "'interpolate' with max_staleness = 0, expected 'generator'"),
        (
            {"loss": {"narrowing": 0.5, "narrowing_floor": 1.0}},
            "loss.narrowing: found 0.5 with loss.narrowing_floor = 1, where it has no effect",
        ),
        ({"optimizer": {"warmup_share": 0.001}}, "optimizer.warmup_share: found 0.001 of 400 updates"),
        (
            {"optimizer": {"schedule": "cosine", "final_lr_share": 1.0}},
            "optimizer.schedule: found 'cosine' with optimizer.final_lr_share = 1",
        ),
        ({"optimizer": {"max_skipped_steps": 101}}, "optimizer.max_skipped_steps: found 101 with steps = 100"),
        ({"sampling": {"top_k": 1}}, "sampling.top_k: found 1, expected 0 or at least 2"),
        ({"run": {"name": "mine", "dir": "there"}}, "run.name: found 'mine' with run.dir = 'there'"),
        (
            {"model": "m", "data": {"train": [{"path": "x", "weight": 2.0}]}},
            "data.train: x: found a weight of 2 for the only file",
        ),
        (
            {"model": "m", "data": {"train": "x", "test": [{"path": "y"}, {"path": "z", "weight": 0.5}]}},
            "data.test: z: found a weight of 0.5, where it has no effect",
        ),
        (
            {"group_size": 2, **_ranks(data=16)},
            "learner.parallel.data: found 16, expected at most groups_per_step / updates_per_step * group_size = 8",
        ),
        (
            {"generator": {"dtype": "bfloat16", "gate_max": 0.1}},
            "generator.gate_max: found 0.1 with generator.dtype = 'bfloat16', where it has no effect",
        ),
        ({"generator": {"gate_mean": 0.5}}, "generator.gate_mean: found 0.5 with generator.dtype = 'float32'"),
        ({"generator": {"gate_p99": 0.5}}, "generator.gate_p99: found 0.5 with generator.dtype = 'float32'"),
        ({"tiny": {"num_experts": 1}}, "tiny.num_experts: found 1, expected 0 or at least 2"),
        (
            {"model": "m", "data": {"train": "x"}, "tiny": {"num_experts": 8}},
            "tiny.num_experts: found 8 with model = 'm', where it has no effect",
        ),
        ({"made_for": "M", "tiny": {"num_experts": 8}}, "tiny.num_experts: found 8 with model = 'M'"),
        ({"learner": {"routing_replay": True}}, "learner.routing_replay: found true with tiny.num_experts = 0"),
        (_ranks(data=2, expert=4), "learner.parallel.expert: found 4 with learner.parallel.expert_tensor = 1"),
        (_ranks(data=4, expert=2, expert_tensor=4), "expected a product that divides data * tensor * context = 4"),
        (_ranks(sequence=True), "learner.parallel.sequence: found true with learner.parallel.tensor = 1"),
        (_ranks(tensor=2, data=2, expert=2), "learner.parallel.sequence: found false with learner.parallel.tensor = 2"),
        (_ranks(virtual_pipeline=2), "learner.parallel.virtual_pipeline: found 2 with learner.parallel.pipeline = 1"),
        ({"optimizer": {"warmup_steps": 101}}, "optimizer.warmup_steps: found 101, expected at most steps = 100"),
        (
            {"optimizer": {"warmup_steps": 1, "warmup_share": 0.1}},
            "optimizer.warmup_steps = 1, expected one of the two",
        ),
        ({"optimizer": {"schedule": "linear", "warmup_share": 1.0}}, "optimizer.schedule: found 'linear'"),
        ({"optimizer": {"final_lr_share": 0.1}}, "optimizer.final_lr_share: found 0.1 with optimizer.schedule"),
    ],
)
def test_a_contradiction_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        msgspec.convert(changes, Config).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        FRESH,
        {**FRESH, "updates_per_step": 1},
        {"loss": {"overlong_buffer": 100, "overlong_factor": 0.5, "advantage": "leave_one_out"}},
        {"optimizer": {"schedule": "cosine", "warmup_share": 0.1, "final_lr_share": 0.1}},
        {"loss": {"proximal": "generator"}},
        {"max_staleness": 2, "loss": {"proximal": "interpolate"}},
        {"loss": {"narrowing": 0.5, "narrowing_floor": 0.9}},
        {"steps": 3, "optimizer": {"warmup_share": 0.1}},
        {"model": "m", "data": {"train": [{"path": "x", "weight": 2.0}, {"path": "y"}]}},
        {"generator": {"gate_max": 0.1}},
        {"group_size": 3, "lease": {"late": "train_rest"}},
        {"made_for": "M", "learner": {"routing_replay": True}},
        {"loss": {"kl_coefficient": 0.1}, "steps": 1},
    ],
)
def test_what_has_an_effect_is_accepted(changes: dict[str, Any]) -> None:
    msgspec.convert(changes, Config).check()
