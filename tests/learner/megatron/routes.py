"""Routes for tests: random ones, and transformers' Qwen3-MoE made to follow them."""

from typing import Any

import numpy as np
from torch import Tensor


def random_routes(rng: np.random.Generator, num_tokens: int, num_layers: int, num_experts: int, top_k: int) -> Any:
    """Different experts for each token and layer, uint8, shape [tokens, layers * top_k]."""
    drawn = rng.random((num_tokens, num_layers, num_experts)).argsort(axis=-1)[..., :top_k]
    return drawn.astype(np.uint8).reshape(num_tokens, -1)


class Forced:
    """Sends the tokens of a transformers model where `routes` say, with the shares that its routers give them.

    Attributes:
        routes: Int[tokens, layers, top_k] of the next forward pass, or None.
    """

    def __init__(self, model: Any) -> None:
        self.routes: Tensor | None = None
        for layer, block in enumerate(model.model.layers):
            block.mlp.gate.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def follow(router: Any, _: Any, found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            if self.routes is None:
                return found
            logits, chosen = found[0], self.routes[:, layer].long()
            shares = logits.softmax(-1).gather(1, chosen)
            if router.norm_topk_prob:
                shares = shares / shares.sum(-1, keepdim=True)
            return logits, shares, chosen

        return follow
