"""Combinations of keys that contradict each other, or in which one has no effect: each with its one-line message."""

import math
from typing import TYPE_CHECKING

from common.contradictions_of_checkpoints import contradictions_of_checkpoints
from common.contradictions_of_data import Contradictions, contradictions_of_data
from common.hardware import PlacementConfig
from common.learning import LossConfig, OptimizerConfig, ParallelConfig
from common.sections import GeneratorConfig, RunConfig

if TYPE_CHECKING:
    from common.config import Config

_GENERATOR = GeneratorConfig()
_LOSS = LossConfig()
_OPTIMIZER = OptimizerConfig()
_PLACEMENT = PlacementConfig()
_RUN = RunConfig()


def contradictions(config: "Config") -> Contradictions:
    """Whether each combination is there, and what to say then."""
    return [
        *_of_the_run(config),
        *_of_the_tiny_model(config),
        *contradictions_of_data(config),
        *_of_clips(config),
        *_of_the_reference(config),
        *_of_rates(config),
        *_of_ranks(config.learner.parallel),
        *_of_shares(config),
        *_of_machines(config),
        *_of_engines(config),
        *contradictions_of_checkpoints(config),
    ]


def _of_the_run(config: "Config") -> Contradictions:
    return [
        (
            config.groups_per_step % config.updates_per_step != 0,
            f"updates_per_step: found {config.updates_per_step}, expected a divisor of groups_per_step = "
            f"{config.groups_per_step}",
        ),
        (
            bool(config.model) != bool(config.data.train),
            f"model and data.train: found {config.model!r} and {config.data.train!r}, expected both or neither",
        ),
        (
            bool(config.data.test) and not config.data.train,
            f"data.test: found {config.data.test!r} without data.train, expected both",
        ),
        (
            config.learner.dtype == "bfloat16" and config.generator.dtype == "float32",
            "generator.dtype: found 'float32' with learner.dtype = 'bfloat16', expected 'bfloat16': the gate compares "
            "their logprobs",
        ),
        (
            config.sampling.temperature == 0,
            "sampling.temperature: found 0, expected more: a greedy group is uniform and teaches nothing",
        ),
        (
            config.sampling.top_k == 1,
            "sampling.top_k: found 1, expected 0 or at least 2: a greedy group is uniform and teaches nothing",
        ),
        (
            config.lease.late == "train_rest" and config.group_size == 2,
            "lease.late: found 'train_rest' with group_size = 2, where it has no effect: at least two must be there",
        ),
        (
            bool(config.run.dir) and config.run.name != _RUN.name,
            f"run.name: found {config.run.name!r} with run.dir = {config.run.dir!r}, where it has no effect",
        ),
    ]


def _of_the_tiny_model(config: "Config") -> Contradictions:
    num_experts = config.tiny.num_experts
    is_built_in = not config.model and not config.made_for
    return [
        (
            not is_built_in and num_experts != 0,
            f"tiny.num_experts: found {num_experts} with model = {config.model or config.made_for!r}, where it has no "
            "effect",
        ),
        (
            num_experts == 1,
            "tiny.num_experts: found 1, expected 0 or at least 2: each token goes to two",
        ),
        (
            is_built_in and not num_experts and config.learner.routing_replay,
            "learner.routing_replay: found true with tiny.num_experts = 0, expected false: the model has no experts",
        ),
    ]


def _of_clips(config: "Config") -> Contradictions:
    loss, fresh = config.loss, config.max_staleness == 0
    only_ratio = loss.proximal == "generator"
    return [
        (
            loss.proximal != "recompute" and config.updates_per_step == 1 and fresh,
            f"loss.proximal: found {loss.proximal!r} with updates_per_step = 1 and max_staleness = 0, expected "
            "'recompute': no ratio differs from 1 there",
        ),
        (
            loss.proximal == "interpolate" and config.max_staleness <= 1,
            f"loss.proximal: found 'interpolate' with max_staleness = {config.max_staleness}, expected 'generator' or "
            "'recompute': up to a staleness of 1 the mixture is the generator's alone",
        ),
        (
            loss.clip_low >= 1,
            f"loss.clip_low: found {loss.clip_low:g}, expected less than 1: it would never bind",
        ),
        (
            only_ratio and loss.weight_cap != _LOSS.weight_cap,
            f"loss.weight_cap: found {loss.weight_cap:g} with loss.proximal = 'generator', where it has no effect",
        ),
        (
            only_ratio and loss.staleness_clip != _LOSS.staleness_clip,
            f"loss.staleness_clip: found {loss.staleness_clip:g} with loss.proximal = 'generator', where it has no "
            "effect: the staleness ratio is 1",
        ),
        (
            fresh and loss.staleness_clip != _LOSS.staleness_clip,
            f"loss.staleness_clip: found {loss.staleness_clip:g} with max_staleness = 0, where it has no effect",
        ),
        (
            fresh and loss.narrowing != 0,
            f"loss.narrowing: found {loss.narrowing:g} with max_staleness = 0, where it has no effect",
        ),
        (
            loss.narrowing == 0 and loss.narrowing_floor != _LOSS.narrowing_floor,
            f"loss.narrowing_floor: found {loss.narrowing_floor:g} with loss.narrowing = 0, where it has no effect",
        ),
        (
            loss.narrowing != 0 and loss.narrowing_floor == 1,
            f"loss.narrowing: found {loss.narrowing:g} with loss.narrowing_floor = 1, where it has no effect",
        ),
    ]


def _of_the_reference(config: "Config") -> Contradictions:
    coefficient = config.loss.kl_coefficient
    return [
        (
            math.isinf(coefficient),
            "loss.kl_coefficient: found inf, expected a finite number: the divergence begins at 0",
        ),
        (
            coefficient > 0 and config.steps * config.updates_per_step == 1,
            f"loss.kl_coefficient: found {coefficient:g} with steps = 1 and updates_per_step = 1, where it has no "
            "effect: the first update starts at the reference",
        ),
    ]


def _of_rates(config: "Config") -> Contradictions:
    optimizer = config.optimizer
    constant = optimizer.schedule == "constant"
    num_updates = config.steps * config.updates_per_step
    return [
        (
            optimizer.warmup_share > 0 and round(optimizer.warmup_share * num_updates) == 0,
            f"optimizer.warmup_share: found {optimizer.warmup_share:g} of {num_updates} updates, where it has no "
            "effect: it is less than one",
        ),
        (
            not constant and optimizer.final_lr_share == 1,
            f"optimizer.schedule: found {optimizer.schedule!r} with optimizer.final_lr_share = 1, where it has no "
            "effect",
        ),
        (
            optimizer.max_skipped_steps != _OPTIMIZER.max_skipped_steps and optimizer.max_skipped_steps > config.steps,
            f"optimizer.max_skipped_steps: found {optimizer.max_skipped_steps} with steps = {config.steps}, where it "
            "has no effect",
        ),
        (
            optimizer.warmup_steps > config.steps,
            f"optimizer.warmup_steps: found {optimizer.warmup_steps}, expected at most steps = {config.steps}",
        ),
        (
            optimizer.warmup_steps > 0 and optimizer.warmup_share > 0,
            f"optimizer.warmup_share: found {optimizer.warmup_share:g} with optimizer.warmup_steps = "
            f"{optimizer.warmup_steps}, expected one of the two",
        ),
        (
            not constant and (optimizer.warmup_steps == config.steps or optimizer.warmup_share == 1),
            f"optimizer.schedule: found {optimizer.schedule!r} with warm-up all through, where it has no effect",
        ),
        (
            constant and optimizer.final_lr_share != _OPTIMIZER.final_lr_share,
            f"optimizer.final_lr_share: found {optimizer.final_lr_share:g} with optimizer.schedule = 'constant', where "
            "it has no effect",
        ),
    ]


def _of_ranks(parallel: ParallelConfig) -> Contradictions:
    experts = parallel.expert * parallel.expert_tensor
    return [
        (
            parallel.num_stage_ranks % experts != 0,
            f"learner.parallel.expert: found {parallel.expert} with learner.parallel.expert_tensor = "
            f"{parallel.expert_tensor}, expected a product that divides data * tensor * context = "
            f"{parallel.num_stage_ranks}",
        ),
        (
            parallel.sequence and parallel.tensor == 1,
            "learner.parallel.sequence: found true with learner.parallel.tensor = 1, where it has no effect",
        ),
        (
            experts > 1 and parallel.tensor > 1 and not parallel.sequence,
            f"learner.parallel.sequence: found false with learner.parallel.tensor = {parallel.tensor} and experts "
            "divided over ranks, expected true: tokens are exchanged between experts once, not by each tensor rank",
        ),
        (
            parallel.virtual_pipeline > 1 and parallel.pipeline == 1,
            f"learner.parallel.virtual_pipeline: found {parallel.virtual_pipeline} with learner.parallel.pipeline = 1, "
            "where it has no effect",
        ),
    ]


def _of_shares(config: "Config") -> Contradictions:
    data = config.learner.parallel.data
    sequences = config.groups_per_step // config.updates_per_step * config.group_size
    return [
        (
            data > sequences,
            f"learner.parallel.data: found {data}, expected at most groups_per_step / updates_per_step * group_size = "
            f"{sequences}: a replica would have no completion of an update",
        ),
    ]


def _of_machines(config: "Config") -> Contradictions:
    placement, ranks = config.placement, config.learner.parallel.num_ranks
    gpus = placement.gpus_per_node
    return [
        *(
            (
                gpus == 0 and getattr(placement, key) != getattr(_PLACEMENT, key),
                f"placement.{key}: found {getattr(placement, key):g} with placement.gpus_per_node = 0, where it has no "
                "effect",
            )
            for key in ("gpu_memory_gib", "host_memory_gib")
        ),
        (
            gpus == 0 and config.learner.offload_optimizer,
            "learner.offload_optimizer: found true with placement.gpus_per_node = 0, expected false: without GPUs the "
            "state is on the host already",
        ),
        (
            ranks > gpus > 0 and ranks % gpus != 0,
            f"learner.parallel: found {ranks} ranks, expected at most placement.gpus_per_node = {gpus} or a multiple "
            "of it: the learner's ranks fill whole nodes",
        ),
    ]


def _of_engines(config: "Config") -> Contradictions:
    parallel, gpus = config.generator.parallel, config.placement.gpus_per_node
    return [
        (
            parallel.num_gpus % parallel.expert != 0,
            f"generator.parallel.expert: found {parallel.expert}, expected a divisor of generator.parallel.tensor * "
            f"data = {parallel.num_gpus}",
        ),
        (
            parallel.num_gpus > max(gpus, 1),
            f"generator.parallel: found tensor * data = {parallel.num_gpus}, expected at most "
            f"placement.gpus_per_node = {gpus}: an engine is on one node"
            + (", and on a CPU is one process" if gpus == 0 else ""),
        ),
        *(
            (
                config.generator.dtype == dtype and getattr(config.generator, key) != getattr(_GENERATOR, key),
                f"generator.{key}: found {getattr(config.generator, key):g} with generator.dtype = {dtype!r}, where it "
                "has no effect",
            )
            for key, dtype in (("gate_max", "bfloat16"), ("gate_mean", "float32"), ("gate_p99", "float32"))
        ),
    ]
