"""Routed experts as bytes: what is wrong with them is told in one line."""

import numpy as np
import pytest

from common.errors import WireError
from common.routes import RouteShape, encode_routes, routes_reason

SHAPE = RouteShape(num_layers=2, num_experts=8, top_k=2)
CHOSEN = np.array([[[0, 1], [7, 2]], [[3, 4], [5, 6]]], np.int32).ravel()


def test_a_byte_a_choice_for_every_token_but_the_last() -> None:
    routes = encode_routes(np.append(CHOSEN, [9] * 4).astype(np.int32), 3, SHAPE)  # the rest is of no token
    assert routes == bytes([0, 1, 7, 2, 3, 4, 5, 6])
    assert routes_reason(routes, 3, SHAPE) == ""


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (CHOSEN[:6], "found 6 routed experts, expected 2 tokens * 2 layers * 2 = 8"),
        (np.where(CHOSEN == 7, 8, CHOSEN), "found expert 8 among the routed ones, expected 0 to 7"),
        (np.where(CHOSEN == 7, -1, CHOSEN), "found expert -1 among the routed ones, expected 0 to 7"),
        (np.where(CHOSEN == 2, 7, CHOSEN), "found one expert twice among the 2 of a token"),
    ],
)
def test_wrong_routes_are_refused(chosen: np.ndarray, message: str) -> None:
    with pytest.raises(WireError) as caught:
        encode_routes(chosen.astype(np.int32), 3, SHAPE)
    assert message in str(caught.value)


def test_bytes_of_another_length_or_model_are_told() -> None:
    assert "found 8 routed experts, expected 3 tokens" in routes_reason(bytes(8), 4, SHAPE)
    assert "found expert 8" in routes_reason(bytes([0, 1, 2, 8]), 2, SHAPE)
