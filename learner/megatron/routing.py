"""Routing replay: each token goes to the experts that the engine sent it to; their shares are the learner's to say.

Engine and learner compute the routers' logits with other kernels, and where two experts are nearly equal they choose
differently: then the learner judges a token that another model sampled. With the choices replayed the probabilities
still come from the learner's router, and its weights have their gradient, through the chosen experts.

Megatron's routers ask a `RouterReplay` (megatron/core/transformer/moe/router_replay.py) for their choices. It holds
those of the forward pass in hand and, where layers are computed again in the backward pass, a queue of those to come.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import UInt8
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor


class RoutingReplay:
    """The routers of a model, or of one piece of it where it is divided into pipeline stages.

    What this does not do: fused routers, which ask nobody.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Takes hold of every router in `model`, which may be wrapped.

        It does what `moe_enable_routing_replay` does while a model is built, without Megatron's list of all routers
        of the process, which never forgets one.
        """
        routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        assert routers, "a model without experts has no routes to replay"
        self._config: Any = routers[0].config
        assert not self._config.moe_router_fusion
        self._replays: list[tuple[int, RouterReplay]] = []
        for router in routers:
            assert router.layer_number is not None
            router.router_replay = replay = RouterReplay()
            RouterReplay.global_router_replay_instances.remove(replay)
            self._replays.append((router.layer_number - 1, replay))

    @contextmanager
    def forward(self, routes: UInt8[Tensor, "tokens choices"] | None) -> Generator[None]:
        """One forward pass in the block sends its tokens where `routes` say; None lets the routers choose.

        Backward passes may follow later, but each router's in the order of its forward passes, as in all of Megatron's
        schedules: layers that they compute again route as before.

        Args:
            routes: Of the tokens that the routers see, in their order: those of this rank, where ranks share a
                sequence. Layer by layer, all layers of the model, `top_k` choices each.
        """
        if routes is None:
            assert not torch.is_grad_enabled(), "an update without routes"
            self._set_action(None)
        else:
            chosen = routes.unflatten(1, (self._config.num_layers, self._config.moe_router_topk)).long()
            for layer, replay in self._replays:
                replay.set_target_indices(chosen[:, layer])
            self._set_action(RouterReplayAction.REPLAY_FORWARD)
        try:
            yield
        finally:
            if routes is not None and not (torch.is_grad_enabled() and self._computes_again):
                for _, replay in self._replays:
                    replay.replay_backward_list.pop()
            self._set_action(RouterReplayAction.REPLAY_BACKWARD)

    def forget(self) -> None:
        """Drops what no backward pass asked for: after an update."""
        for _, replay in self._replays:
            replay.clear_indices()

    @property
    def _computes_again(self) -> bool:
        """Whether backward passes compute the routers again."""
        whole = self._config.recompute_granularity == "full"
        return whole or "moe" in (self._config.recompute_modules or ())

    def _set_action(self, action: RouterReplayAction | None) -> None:
        for _, replay in self._replays:
            if action is None:
                replay.clear_router_replay_action()
            else:
                replay.set_router_replay_action(action)
