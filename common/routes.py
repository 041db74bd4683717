"""Routed experts as bytes: which experts each token was sent to, one byte a choice.

A completion's routes are those of every token of its prompt and response but the last, which no forward pass of the
engine has seen: shape [prompt + response - 1, layers, top_k], in C order. The order of the choices of one token and
layer means nothing.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import WireError
from common.shape import ModelShape

MAX_EXPERTS = 256


class RouteShape(NamedTuple):
    """What a model's routes look like.

    Attributes:
        num_layers: Every layer has experts.
        num_experts: Of a layer.
        top_k: Experts that a layer sends a token to.
    """

    num_layers: int
    num_experts: int
    top_k: int

    @property
    def size_bytes(self) -> int:
        """Of one token."""
        return self.num_layers * self.top_k


def route_shape(shape: ModelShape) -> RouteShape:
    """The routes of a model that has experts."""
    assert shape.is_moe
    return RouteShape(shape.num_hidden_layers, shape.total_experts, shape.num_experts_per_tok)


def encode_routes(chosen: NDArray[np.int32], num_tokens: int, shape: RouteShape) -> bytes:
    """Routes as a completion carries them.

    Args:
        chosen: Experts of at least all tokens but the last, flat.
        num_tokens: Of prompt and response.
        shape: Of the model's routes.

    Raises:
        WireError: There are too few, or a token's choices in a layer are not different experts of the model.
    """
    expected = (num_tokens - 1) * shape.size_bytes
    chosen = chosen[:expected]
    if len(chosen) == expected and (chosen.min() < 0 or chosen.max() >= shape.num_experts):
        raise WireError(_outside(int(chosen.min() if chosen.min() < 0 else chosen.max()), shape))
    routes = chosen.astype(np.uint8)
    if reason := routes_reason(routes.tobytes(), num_tokens, shape):
        raise WireError(reason)
    choices = np.ascontiguousarray(routes.reshape(-1, shape.top_k).T)
    if any((one == other).any() for one, other in combinations(choices, 2)):
        raise WireError(f"found one expert twice among the {shape.top_k} of a token, expected different ones")
    return routes.tobytes()


def routes_reason(routes: bytes, num_tokens: int, shape: RouteShape) -> str:
    """Why bytes cannot be the routes of a prompt and response of `num_tokens`; empty where they can."""
    expected = (num_tokens - 1) * shape.size_bytes
    if len(routes) != expected:
        return (
            f"found {len(routes)} routed experts, expected {num_tokens - 1} tokens * {shape.num_layers} layers * "
            f"{shape.top_k} = {expected}"
        )
    highest = int(np.frombuffer(routes, np.uint8).max(initial=0))
    return _outside(highest, shape) if highest >= shape.num_experts else ""


def _outside(expert: int, shape: RouteShape) -> str:
    return f"found expert {expert} among the routed ones, expected 0 to {shape.num_experts - 1}"
