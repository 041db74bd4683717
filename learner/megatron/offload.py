"""AdamW whose moments are in host memory."""

from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer

from learner.megatron.substitutes import FusedAdam, substitute_transformer_engine


def choose_adam(*, on_host: bool) -> None:
    """Says which AdamW Megatron's optimizers are made with from now on: this one, or the one there is."""
    namespaces: list[Any] = [optimizer, distrib_optimizer]
    for namespace in namespaces:
        namespace.Adam = HostAdam if on_host else _STANDARD[namespace.__name__]


def standard_adam() -> type:
    """The AdamW there is."""
    return _STANDARD[optimizer.__name__]


class HostAdam(FusedAdam):
    """AdamW bit for bit as `FusedAdam`, with its two float32 moments on the host.

    The step is made where the parameters are: the moments of one tensor at a time come there and go back. So the GPU
    needs room for those of the largest tensor alone. Megatron's float32 masters stay on the GPU. In place of Megatron's
    own offloading, whose step is on the CPU, and which cannot be tried without a GPU.
    """

    def make_state(self) -> None:
        """Makes the moments, 0, in pinned memory where there is a GPU."""
        pinned = torch.cuda.is_available()
        for param in (param for group in self.param_groups for param in group["params"]):
            self.state[param] = {
                name: torch.zeros(param.shape, dtype=torch.float32, pin_memory=pinned)
                for name in ("exp_avg", "exp_avg_sq")
            }

    def _step_group(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for param in params:
            host = self.state[param]
            self.state[param] = {name: moment.to(param.device, non_blocking=True) for name, moment in host.items()}
            super()._step_group(group, [param])
            for name, moment in self.state[param].items():
                host[name].copy_(moment)
            self.state[param] = host


substitute_transformer_engine()
_STANDARD: dict[str, Any] = {module.__name__: getattr(module, "Adam") for module in (optimizer, distrib_optimizer)}  # noqa: B009
