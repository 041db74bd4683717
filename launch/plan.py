"""What a configuration comes to: the processes with their command lines, and the numbers that follow from it."""

import sys
from pathlib import Path
from typing import NamedTuple

from common.config import Config
from launch.placement import place

REPOSITORY = Path(__file__).resolve().parent.parent
FREE_PORT = "{free_port}"
STOP_ORDER = ("learner", "generator", "verifier", "ledger")


class ProcessPlan(NamedTuple):
    """One process to start.

    Attributes:
        name: Unique in the run, such as `generator-0`; logs are named by it.
        role: learner, generator, verifier or ledger.
        command: Its command line; `FREE_PORT` in it becomes a free port at each start.
        gpus: Those of its node that are its own; where there are none, it takes what it finds.
    """

    name: str
    role: str
    command: tuple[str, ...]
    gpus: tuple[int, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """What the process has in its environment beside what all have."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))} if self.gpus else {}


def plan_processes(config: Config, run_dir: Path) -> list[ProcessPlan]:
    """The processes of a run, in the order in which they start."""
    run = str(run_dir)
    plans = [
        ProcessPlan("ledger", "ledger", _python("learner.ledger", run)),
        *_fleet("verifier", config.verifier.count, run),
        *_fleet("generator", config.generator.count, run),
        ProcessPlan("learner", "learner", _torchrun(config, run)),
    ]
    gpus = _gpus(config)
    return [plan._replace(gpus=gpus.get(plan.name, ())) for plan in plans]


def prepare_command(run_dir: Path) -> tuple[str, ...]:
    """Loads, checks and tokenizes the prompts before anything else starts."""
    return _python("learner.ledger", "--prepare", str(run_dir))


def tiny_command(directory: Path, seed: int, num_experts: int = 0) -> tuple[str, ...]:
    """Builds the tiny model and its task."""
    experts = ("--experts", str(num_experts)) if num_experts else ()
    return _python("launch.tiny", str(directory), "--seed", str(seed), *experts)


def derived_numbers(config: Config) -> dict[str, int]:
    """What the counts of the configuration come to."""
    sequences = config.groups_per_step * config.group_size
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    return {
        "learner ranks": config.learner.parallel.num_ranks,
        "sequences per step": sequences,
        "sequences per update": sequences // config.updates_per_step,
        "optimizer updates": config.steps * config.updates_per_step,
        "tokens per micro-batch, at most": config.learner.max_tokens_per_microbatch,
        "tokens per sequence, at most": longest,
        "longest sequences per micro-batch": config.learner.max_tokens_per_microbatch // longest,
        "staleness budget: groups under way, at most": (config.max_staleness + 1) * config.groups_per_step,
    }


def _gpus(config: Config) -> dict[str, tuple[int, ...]]:
    """The GPUs of each process that has any, on its own node."""
    if config.placement.gpus_per_node == 0:
        return {}
    placement = place(config)
    engines = {engine.name: engine.gpus for engine in placement.engines}
    return engines | {"learner": tuple(rank.gpu for rank in placement.ranks if rank.node == 0)}


def _fleet(role: str, count: int, run: str) -> list[ProcessPlan]:
    names = [f"{role}-{index}" for index in range(count)]
    return [ProcessPlan(name, role, _python(role, run, name)) for name in names]


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def _torchrun(config: Config, run: str) -> tuple[str, ...]:
    """Torchrun never restarts ranks itself: the launcher does."""
    per_node = config.placement.gpus_per_node or config.learner.parallel.num_ranks
    ranks = f"--nproc-per-node={min(config.learner.parallel.num_ranks, per_node)}"
    options = ("--max-restarts=0", ranks, "--master-addr=127.0.0.1", f"--master-port={FREE_PORT}")
    patience = f"--shutdown-timeout={int(config.run.stop_timeout_s)}"
    return _python("torch.distributed.run", *options, patience, "-m", "learner", run)
