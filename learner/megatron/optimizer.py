"""AdamW with warm-up and a schedule, as Megatron's distributed optimizer."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from common.config import Config
from learner.megatron.offload import HostAdam, choose_adam
from learner.saved import WEIGHT


def wrap_model(pieces: Sequence[GPTModel]) -> list[DistributedDataParallel]:
    """The pieces of a model with their gradients in float32 buffers, to be reduced once an update."""
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return [DistributedDataParallel(piece.config, options, piece) for piece in pieces]


class Owned(NamedTuple):
    """What a rank's optimizer has of a parameter: a range of it, laid out flat.

    Attributes:
        start: Of the range.
        tensors: By kind: `weight.`, `exp_avg.`, `exp_avg_sq.`, each Float[range] in float32.
    """

    start: int
    tensors: dict[str, torch.Tensor]


class Optimizer:
    """Steps the model, and its own learning rate.

    Attributes:
        megatron: The optimizer: float32 masters of bfloat16 parameters, two float32 moments.
        schedule: Counts updates: warm-up is linear, from the first; the rest is as `optimizer.schedule` says.
    """

    def __init__(self, config: Config, pieces: list[DistributedDataParallel], dtype: torch.dtype) -> None:
        """The model's weights must be set: the masters are taken from them."""
        options = config.optimizer
        self._chunks = pieces
        choose_adam(on_host=config.learner.offload_optimizer)
        self.megatron: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                min_lr=options.lr * options.final_lr_share,
                weight_decay=options.weight_decay,
                adam_beta1=options.beta1,
                adam_beta2=options.beta2,
                adam_eps=options.eps,
                clip_grad=options.clip_norm,
                bf16=dtype is torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
            ),
            list[MegatronModule](pieces),
        )
        for part in self.megatron.chained_optimizers:  # so that there is a state to save before the first update
            if isinstance(part.optimizer, HostAdam):
                part.optimizer.make_state()
            else:
                part.init_state_fn(part.optimizer, part.config)
        self.schedule = learning_rates(config, self.megatron)

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        groups: list[dict[str, Any]] = self.megatron.param_groups
        return float(groups[0]["lr"])

    @property
    def num_updates(self) -> tuple[int, int]:
        """Updates that the schedule has counted, and those that changed the parameters."""
        groups: list[dict[str, Any]] = self.megatron.param_groups
        return self.schedule.num_steps, max(int(group.get("step") or 0) for group in groups)

    def go_on_after(self, num_counted: int, num_made: int) -> None:
        """As if so many updates had been counted and made, with parameters and moments as they are now."""
        for part in self._parts:
            part._copy_main_params_to_model_params()
            for group in part.param_groups:
                group["step"] = num_made
        for chunk in self._chunks:
            chunk.start_param_sync()
        self.schedule.num_steps = 0
        self.schedule.step(num_counted)

    def owned(self, parameter: torch.nn.Parameter, *, copy: bool) -> Owned | None:
        """This rank's range of a parameter, live or copied to host memory; None where others have all of it."""
        for part in self._parts:
            if parameter in part.model_param_group_index_map:
                tensors = part._get_main_param_and_optimizer_states(parameter)
                start = part._get_model_param_range_map(parameter)["param"].start
                tensors = {WEIGHT: tensors.pop("param")} | {f"{kind}.": tensor for kind, tensor in tensors.items()}
                flat = {kind: tensor.detach().view(-1) for kind, tensor in tensors.items()}
                return Owned(start, {kind: t.to("cpu", copy=True) for kind, t in flat.items()} if copy else flat)
        return None

    @property
    def _parts(self) -> list[Any]:
        """Megatron's optimizers: of experts, and of the rest."""
        return [part for part in self.megatron.chained_optimizers if not part.is_stub_optimizer]

    def step(self) -> tuple[float, bool]:
        """Clips the gradients and updates the parameters; returns the gradients' norm, and whether it was a number.

        Where it was none, the parameters and both moments stay as they are.
        """
        self.schedule.step(1)
        self.megatron.prepare_grads()
        grad_norm = float(self.megatron.get_grad_norm())
        finite = math.isfinite(grad_norm)
        if finite:
            self.megatron.step()
        return grad_norm, finite


def learning_rates(config: Config, megatron: Any) -> OptimizerParamScheduler:
    """The learning rate of each update: the last of the warm-up has `lr`; the final share is reached after the last."""
    options = config.optimizer
    warmup = round((options.warmup_steps or options.warmup_share * config.steps) * config.updates_per_step)
    num_updates = config.steps * config.updates_per_step
    return OptimizerParamScheduler(
        megatron,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.lr * options.final_lr_share,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(num_updates, warmup) + 1,
        lr_decay_style=options.schedule,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
