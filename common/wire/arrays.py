"""Per-token arrays as little-endian bytes, and back without a copy."""

import numpy as np
from numpy.typing import NDArray


def ints(data: bytes) -> NDArray[np.int32]:
    """A read-only int32 view, shape [n]."""
    return np.frombuffer(data, dtype="<i4")


def floats(data: bytes) -> NDArray[np.float32]:
    """A read-only float32 view, shape [n]."""
    return np.frombuffer(data, dtype="<f4")


def int_bytes(values: NDArray[np.int32] | list[int]) -> bytes:
    """Values as little-endian int32."""
    return np.asarray(values, dtype="<i4").tobytes()


def float_bytes(values: NDArray[np.float32] | list[float]) -> bytes:
    """Values as little-endian float32."""
    return np.asarray(values, dtype="<f4").tobytes()
