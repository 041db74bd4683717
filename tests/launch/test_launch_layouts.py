"""The layouts of the four recipes: their values, what their dry runs say, and what is refused."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.errors import ConfigError
from common.hardware import PlacementConfig
from common.layout import load_config
from launch import checks
from launch.builtin import tiny_directory, with_tiny_task
from launch.cluster import LAYOUTS
from tests.launch.conftest import SHAPE, Cluster

PAPER = {"loss.clip_low": 3e-4, "loss.clip_high": 4e-4, "loss.proximal": "recompute", "group_size": 16}
LENGTHS = {"data.max_prompt_tokens": 2048, "sampling.max_tokens": 8192, "evaluation.sampling.max_tokens": 8192}
SAMPLING = {
    "sampling.temperature": 1.0,
    "sampling.top_p": 1.0,
    "sampling.top_k": 0,
    "evaluation.sampling.temperature": 1.0,
    "evaluation.sampling.top_p": 0.7,
    "evaluation.num_samples": 1,
    "evaluation.every": 10,
}
TRAINING = {
    "optimizer.lr": 1e-6,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 1.0,
    "learner.dtype": "bfloat16",
}
COMMON = PAPER | LENGTHS | SAMPLING | TRAINING | {"generator.memory_share": 0.8, "placement.gpus_per_node": 8}
EP = {
    "made_for": "Qwen/Qwen3-30B-A3B-Base",
    "groups_per_step": 256,
    "updates_per_step": 8,
    "loss.overlong_buffer": 4096,
    "loss.overlong_factor": 1.0,
    "learner.parallel.pipeline": 1,
    "learner.parallel.context": 1,
    "learner.parallel.expert_tensor": 1,
    "learner.recompute": "full",
    "learner.offload_optimizer": True,
}
RECIPES: dict[str, dict[str, Any]] = {
    "ep8": {
        **COMMON,
        **EP,
        "steps": 500,
        "data.over_long": "drop",
        "learner.checkpoint_every": 500,
        "learner.max_tokens_per_microbatch": 30_720,
        "learner.parallel.tensor": 2,
        "learner.parallel.expert": 8,
        "generator.parallel.tensor": 4,
        "generator.parallel.data": 1,
        "generator.parallel.expert": 1,
    },
    "ep4": {
        **COMMON,
        **EP,
        "steps": 300,
        "data.over_long": "truncate_left",
        "optimizer.warmup_steps": 10,
        "learner.checkpoint_every": 30,
        "learner.max_tokens_per_microbatch": 10_240,
        "learner.parallel.tensor": 4,
        "learner.parallel.expert": 4,
        "generator.parallel.tensor": 1,
        "generator.parallel.data": 4,
        "generator.parallel.expert": 4,
        "generator.prefill_chunk_tokens": 10_240,
    },
    "dense3b": {
        **COMMON,
        "made_for": "Qwen/Qwen2.5-3B-Instruct",
        "steps": 500,
        "groups_per_step": 512,
        "updates_per_step": 4,
        "data.over_long": "drop",
        "loss.overlong_buffer": 0,
        "optimizer.warmup_share": 0.05,
        "learner.checkpoint_every": 10,
        "learner.max_tokens_per_microbatch": 20_480,
        "learner.parallel.tensor": 1,
        "generator.parallel.tensor": 1,
        "generator.prefill_chunk_tokens": 10_240,
    },
}
PLANS = {
    "ep8": (
        "model: Qwen/Qwen3-30B-A3B-Base, 30,532,122,624 parameters",
        "placement: 16 GPUs on 2 nodes of 8",
        "node 0: GPU 0-7 learner 0-7",
        "node 1: GPU 0-3 generator-0, GPU 4-7 generator-1",
        "learner: data 4, tensor 2, expert 8",
        "rank 5 on node 0 GPU 5: data 2, tensor 1, expert 5",
        "rank 0-7, 4,400,822,272 parameters:",
        "    weights         8.20 GiB  bfloat16",
        "    gradients      16.39 GiB  float32",
        "    optimizer      14.22 GiB  float32 masters; the moments are on the host",
        "    in all         49.68 GiB  of 80.00 GiB, 30.32 GiB free",
        "    on the host    71.12 GiB  moments 28.45 GiB + the copy that a checkpoint under way writes 42.67 GiB",
        "memory of each of an engine's 4 GPUs (tensor 4, data 1, expert 1):",
        "    KV cache       45.78 GiB  2,000,000 tokens: 195 of the longest sequences",
        "    in all         60.01 GiB  of 64.00 GiB, 3.99 GiB free; 16.00 GiB are left",
        "  node 0: optimizer state 227.58 GiB + a checkpoint under way 341.37 GiB + published weights 257.17 GiB = "
        "826.11 GiB of 1024.00 GiB",
        "  node 1: pulled weights 136.49 GiB = 136.49 GiB of 1024.00 GiB",
        "  one version in 16 is kept whole; ",
        "bytes per weight update: 1.25 GiB to each of 2 generators, where 3.6% of the elements change; "
        "the whole model, 56.87 GiB, to one that joins",
        "the learner has 257.17 GiB in /dev/shm, and each generator 68.24 GiB",
        "a version changes 3.6% of the elements, 2.2% of the bytes: as measured in bfloat16",
        "bytes per checkpoint: 341.22 GiB",
        "739.32 GiB within run.stop_timeout_s = 3600",
        "the launcher starts processes on one machine alone, and refuses to start these",
        "generator-1 on node 1: CUDA_VISIBLE_DEVICES=4,5,6,7 python -m generator",
        "learner on node 0: CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 python -m torch",
        "each expert gets as many tokens as the others",
    ),
    "ep4": (
        "node 1: GPU 0-3 generator-0, GPU 4-7 generator-1",
        "learner: data 2, tensor 4, expert_data 2, expert 4",
        "rank 6 on node 0 GPU 6: data 1, tensor 2, expert_data 1, expert 2",
        "500,000 tokens in each of 4 copies: 48 of the longest sequences",
        "    in all         62.13 GiB  of 80.00 GiB, 17.87 GiB free",
    ),
    "dense3b": (
        "model: Qwen/Qwen2.5-3B-Instruct, 3,085,938,688 parameters",
        "placement: 8 GPUs on 1 node of 8",
        "node 0: GPU 0-3 learner 0-3, GPU 4 generator-0, GPU 5 generator-1, GPU 6 generator-2, GPU 7 generator-3",
        "generator-3: CUDA_VISIBLE_DEVICES=7 python -m generator",
        "learner: CUDA_VISIBLE_DEVICES=0,1,2,3 python -m torch.distributed.run",
        "memory of each engine's GPU (tensor 1, data 1, expert 1):",
        "    KV cache       51.50 GiB  1,500,000 tokens: 146 of the longest sequences",
        "bytes per weight update: 82.4",
    ),
    "ep8-tiny": (
        "model: ",
        ", 903,936 parameters",
        "placement: this machine",
        "learner: data 8, expert 8",
        "  rank 7: data 7, expert 7",
        "  rank 0-7, 215,808 parameters:",
        "    KV cache       64.00 MiB  65,536 tokens: 819 of the longest sequences",
        "  each version is kept whole; with the newest and the one in the making ",
        "the learner has 17.52 MiB in /dev/shm, and each generator 5.45 MiB",
    ),
}


@pytest.mark.parametrize("layout", RECIPES)
def test_a_layout_has_the_values_of_its_recipe(layout: str) -> None:
    config = load_config(LAYOUTS / f"{layout}.toml", [])
    values: Any = msgspec.to_builtins(config)
    assert {path: _at(values, path) for path in RECIPES[layout]} == RECIPES[layout]
    assert config.max_staleness > 0
    assert not config.loss.filter_uniform


@pytest.mark.parametrize("layout", PLANS)
def test_a_dry_run_without_a_model_is_a_plan_for_the_one_it_is_made_for(
    cluster: Cluster, tmp_path: Path, layout: str
) -> None:
    ended = cluster("--layout", layout, "--dry-run")
    assert ended.returncode == 0, ended.stderr
    for words in PLANS[layout]:
        assert words in ended.stdout
    config = load_config(LAYOUTS / f"{layout}.toml", [])
    copy = tmp_path / "copy.toml"
    copy.write_text(ended.stdout)
    assert load_config(copy, []) == (config if config.made_for else with_tiny_task(config, tiny_directory(config)))


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (
            ("ep8", "learner.offload_optimizer=false", "learner.max_tokens_per_microbatch=40960"),
            ("learner rank 0: found weights 8.20 GiB + ", "optimizer 42.67 GiB"),
        ),
        (
            ("ep4", "learner.offload_optimizer=false"),
            ("= 90.60 GiB, expected at most placement.gpu_memory_gib = 80",),
        ),
        (
            ("ep4", "placement.gpu_memory_gib=40"),
            ("learner rank 0: ", "expected at most placement.gpu_memory_gib"),
        ),
        (("dense3b", "learner.recompute=none"), ("activations 99.43 GiB",)),
        (
            ("dense3b", "generator.max_total_tokens=2000000"),
            ("generator-0: found weights 5.75 GiB + KV cache 68.66 GiB", "= 64.00 GiB"),
        ),
        (
            ("ep8", "placement.host_memory_gib=400"),
            (
                "found optimizer state 227.58 GiB + a checkpoint under way 341.37 GiB + published weights 257.17 GiB",
                "host_memory_gib = 400",
            ),
        ),
        (("ep8", "placement.host_memory_gib=800", "loss.kl_coefficient=0.01"), ("+ reference 65.58 GiB + ",)),
        (
            ("ep8", "weights.retention=15"),
            ("published weights 968.0", "expected at most placement.host_memory_gib = 1024"),
        ),
        (("ep8", "placement.gpu_memory_gib=48"), ("= 49.68 GiB, expected at most placement.gpu_memory_gib = 48",)),
        (("ep8", "learner.max_tokens_per_microbatch=204800"), ("activations 20.75 GiB", "one layer 25.01 GiB")),
        (("ep8-tiny", "learner.parallel.data=5", "learner.parallel.expert=5"), ("found 5", "num_experts = 8")),
        (("local", "learner.parallel.tensor=4"), ("found 4, expected a divisor", "num_key_value_heads = 2")),
        (("local", "sampling.max_tokens=512"), ("the built-in model: found max_position_embeddings = 512",)),
        (("ep8", "learner.parallel.data=2", "learner.parallel.tensor=8"), ("num_key_value_heads = 4",)),
        (("dense3b", "learner.parallel.tensor=4"), ("found 4, expected a divisor of the model's num_key_value_heads",)),
        (("dense3b", "generator.parallel.data=2"), ("generator.parallel.data: found 2, expected 1",)),
        (("dense3b", "made_for=Qwen/Other"), ("made_for: found 'Qwen/Other'", "Qwen3-30B-A3B-Base")),
    ],
)
def test_what_cannot_fit_is_refused_in_one_line(
    cluster: Cluster, arguments: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    ended = cluster("--dry-run", "--layout", *arguments)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1), ended.stderr
    for fragment in fragments:
        assert fragment in ended.stderr


def test_a_layout_that_is_made_for_a_model_does_not_start_without_one(cluster: Cluster) -> None:
    ended = cluster("--layout", "dense3b")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert "model: found nothing, expected model=DIR data.train=FILE with Qwen/Qwen2.5-3B-Instruct" in ended.stderr


def test_nothing_is_downloaded(cluster: Cluster, prompts: Path) -> None:
    ended = cluster("--layout", "dense3b", "model=Qwen/Qwen2.5-3B-Instruct", f"data.train={prompts}")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert "nothing is downloaded: hf download NAME --local-dir DIR" in ended.stderr


def test_several_nodes_are_planned_and_not_started(
    cluster: Cluster, model: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ("--layout", "local", f"model={model}", f"data.train={prompts}", "placement.gpus_per_node=1")
    planned = cluster(*arguments, "--dry-run")
    assert "placement: 2 GPUs on 2 nodes of 1" in planned.stdout, planned.stderr
    ended = cluster(*arguments)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert "placement: found 2 nodes of 1 GPUs, expected 1" in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_a_machine_without_the_gpus_of_the_plan_starts_nothing(
    model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = load_config(LAYOUTS / "local.toml", [f"model={model}", f"data.train={prompts}"])
    config = msgspec.structs.replace(config, placement=PlacementConfig(gpus_per_node=2))
    monkeypatch.setattr(checks, "DEVICES", tmp_path)
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    with pytest.raises(ConfigError, match="found 2 GPUs for learner ranks and engines, expected at most the 1 of this"):
        checks.check_inputs(config)
    (tmp_path / "nvidia1").touch()
    assert checks.check_inputs(config).hidden_size == SHAPE["hidden_size"]


def test_a_dry_run_needs_no_more_of_a_model_than_its_config(cluster: Cluster, model: Path, prompts: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        (model / name).unlink()
    ended = cluster("--layout", "local", f"model={model}", f"data.train={prompts}", "--dry-run")
    assert ended.returncode == 0, ended.stderr
    attention, mlp, norms = 8 * (8 + 2 * 4) + 8 * 8 + 2 * 4, 3 * 8 * 16, 2 * 8
    assert f"model: {model}, {2 * 64 * 8 + 2 * (attention + mlp + norms) + 8:,} parameters" in ended.stdout
    assert SHAPE["num_hidden_layers"] == 2


def _at(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values
