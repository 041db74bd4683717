"""What SGLang is told when it starts, and what it reads of the model's directory itself."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common.config import Config

MEMORY = "SLUICE_ENGINE_MEMORY"  # the variable that names the engine's memory-backed directory to its processes
_UNLOADED = "0.0"


def prepare_environment(memory: Path) -> bool:
    """Sets what SGLang's processes inherit; returns whether there is no CUDA."""
    import torch

    os.environ[MEMORY] = str(memory)

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if torch.cuda.is_available():
        return False
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    return True


def make_rendezvous(on_cpu: bool) -> TemporaryDirectory[str]:
    """Where SGLang's ranks find each other, by a file: a port that is free now may be taken when they listen.

    Its kernels for CPUs name the memory that ranks share by MASTER_PORT: no other engine of this machine has this one.
    """
    directory = TemporaryDirectory(prefix="sluice-")
    os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{directory.name}/ranks"
    if on_cpu:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(os.getpid())}
    return directory


def server_arguments(config: Config, on_cpu: bool, *, needs_text: bool) -> dict[str, Any]:
    """SGLang's arguments. It counts all GPUs as tensor ranks, of which copies of attention then take shares."""
    generator, parallel = config.generator, config.generator.parallel
    arguments: dict[str, Any] = {
        "model_path": config.model,
        "load_format": "dummy",
        "dtype": generator.dtype,
        "tp_size": parallel.num_gpus,
        "dp_size": parallel.data,
        "enable_dp_attention": parallel.data > 1,
        "ep_size": parallel.expert,
        "max_running_requests": generator.max_running_requests,
        "max_total_tokens": generator.max_total_tokens // parallel.data,  # SGLang means that of one copy
        "mem_fraction_static": generator.memory_share,
        "chunked_prefill_size": generator.prefill_chunk_tokens,
        "random_seed": config.seed,
        "weight_version": _UNLOADED,
        "skip_tokenizer_init": not needs_text,
        "log_level": "warning",
        "host": "127.0.0.1",
        "enable_return_routed_experts": config.learner.routing_replay,
    }
    if on_cpu:
        arguments |= {
            "device": "cpu",
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "disable_overlap_schedule": True,
            "sleep_on_idle": True,  # else an idle engine keeps a core busy
        }
    return arguments


def eos_token_ids(model: Path) -> tuple[int, ...]:
    """End-of-sequence tokens of generation_config.json and config.json."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (model / name).exists():
            value = json.loads((model / name).read_text()).get("eos_token_id")
            found += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    return tuple(dict.fromkeys(found))
