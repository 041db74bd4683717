"""Synthetic bfloat16 models and what Adam makes of them: Qwen3-0.6B with 24 layers (1 GiB), a mixture of experts."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.weights.parts import DType, Part, part_header

Floats = NDArray[np.float32]
HIDDEN, LAYERS = 1024, 24


def _layer(name: str) -> int:
    """The layer of a tensor; -1 where it is outside of them."""
    return int(name.split(".")[2]) if ".layers." in name else -1


_PER_LAYER = {
    "self_attn.q_proj": (2048, HIDDEN),
    "self_attn.k_proj": (1024, HIDDEN),
    "self_attn.v_proj": (1024, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 2048),
    "mlp.gate_proj": (3072, HIDDEN),
    "mlp.up_proj": (3072, HIDDEN),
    "mlp.down_proj": (HIDDEN, 3072),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
SHAPES = {"model.embed_tokens.weight": (151_936, HIDDEN)} | {
    f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in _PER_LAYER.items()
}
NUM_EXPERTS, TOUCHED = 64, 1 / 10  # of the mixture's experts, an update touches a tenth
_MIXTURE_LAYERS, _EXPERT_SIZE = 6, 384
EXPERTS = {
    f"model.layers.{i}.mlp.experts.{expert}.{name}.weight": shape
    for i in range(_MIXTURE_LAYERS)
    for expert in range(NUM_EXPERTS)
    for name, shape in (
        ("gate_proj", (_EXPERT_SIZE, HIDDEN)),
        ("up_proj", (_EXPERT_SIZE, HIDDEN)),
        ("down_proj", (HIDDEN, _EXPERT_SIZE)),
    )
}
MIXTURE = EXPERTS | {
    name: shape for name, shape in SHAPES.items() if ".mlp." not in name and _layer(name) < _MIXTURE_LAYERS
}
_POOL = 1 << 24  # drawn once; each tensor is a piece of it from a place of its own, repeated
_CHUNK = 1 << 20


class Model:
    """Weights as bfloat16 stored them, and how far Adam has moved each, in learning rates, after some updates.

    Matrices are normal with a deviation of 0.02 to 0.05, norms near 1. Half of each gradient is the same in all
    updates, half is noise.
    """

    def __init__(self, updates: tuple[int, ...]) -> None:
        random = np.random.default_rng(0)
        self._normal = random.standard_normal(_POOL, dtype=np.float32)
        self._moved = _adam(random, updates)

    def write(
        self,
        path: Path,
        shapes: dict[str, tuple[int, ...]],
        updates: int,
        lr: float,
        dtype: DType,
        is_touched: Callable[[str], bool] = lambda _: True,
    ) -> Part:
        """Writes the part of these tensors after some updates, or before them (0); those not touched are as before."""
        header, entries = part_header([(name, dtype, shape) for name, shape in shapes.items()])
        with path.open("wb") as file:
            file.write(header)
            for number, entry in enumerate(entries):
                for words in self._words(number, entry.shape, updates * is_touched(entry.name), lr, dtype):
                    file.write(words.data)
        return Part.open(path)

    def _words(
        self, number: int, shape: tuple[int, ...], updates: int, lr: float, dtype: DType
    ) -> Iterator[NDArray[np.uint16] | NDArray[np.uint32]]:
        random = np.random.default_rng(number)
        deviation, mean = (random.uniform(0.02, 0.05), 0.0) if len(shape) > 1 else (0.1, 1.0)
        size, at = int(np.prod(shape)), int(random.integers(_POOL - _CHUNK))
        for start in range(0, size, _CHUNK):
            num = min(_CHUNK, size - start)
            at = at if at + num <= _POOL else 0
            master = self._normal[at : at + num] * np.float32(deviation) + np.float32(mean)
            master = (bfloat16(master).astype(np.uint32) << 16).view(np.float32)
            if updates:
                master -= np.float32(lr) * self._moved[updates][at : at + num]
            at += num
            yield bfloat16(master) if dtype == "BF16" else master.view(np.uint32)


def is_touched(name: str) -> bool:
    """Whether an update changes a tensor of the mixture: all but those of nine in ten experts."""
    return name not in EXPERTS or int(name.split(".")[5]) % round(1 / TOUCHED) == _layer(name) % round(1 / TOUCHED)


def bfloat16(values: Floats) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _adam(random: np.random.Generator, updates: tuple[int, ...]) -> dict[int, Floats]:
    """The sum of Adam's steps after so many updates, betas 0.9 and 0.999."""
    kept: dict[int, Floats] = {}
    lasting = random.standard_normal(_POOL, dtype=np.float32)
    first, second, moved = (np.zeros(_POOL, np.float32) for _ in range(3))
    for number in range(1, max(updates) + 1):
        gradient = np.float32(0.5**0.5) * (lasting + random.standard_normal(_POOL, dtype=np.float32))
        first += np.float32(0.1) * (gradient - first)
        second += np.float32(0.001) * (gradient * gradient - second)
        moved += (first / np.float32(1 - 0.9**number)) / np.sqrt(second / np.float32(1 - 0.999**number))
        if number in updates:
            kept[number] = moved.copy()
    return kept
