"""`python -m tests.bench weights.arithmetic`: what an update of large models takes on a line. Not measured.

Bytes are the model's parameters in bfloat16, times the share of them that a delta has after one Adam-like update at
1e-6, which is measured here on the synthetic model. One generator pulls; of several each takes as much again of the
learner's line. Encoding, checking and the engine's pause are not in it.
"""

import tempfile
from pathlib import Path

import msgspec

from common.shape import ModelShape, read_shape
from common.versions import Version
from common.weights.delta import encode_delta
from launch.parameters import model_parameters
from tests.bench.report import Figure
from tests.bench.weights.synthetic import SHAPES, Model

ROOT = Path(__file__).resolve().parents[3]
LINES = (10, 100, 400)  # Gbit/s
UPDATES, RATE = 1, 1e-6
LARGER = {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "intermediate_size": 12_288,
    "moe_intermediate_size": 1536,
}
PEERS = {
    "Qwen3-30B-A3B": "published: NeMo-RL 0.74 to 1.00 s (whole, NCCL, one cluster), miles 2.16 s (RDMA), verl 7.1 s",
    "Qwen3-235B-A22B": "published: verl 11.4 to 14.9 s (delta), 246 to 266 s (whole)",
}


def run() -> list[Figure]:
    """Both models."""
    share = _share()
    figures = [Figure(f"share of a delta, {UPDATES} update at {RATE:.0e}", 100 * share, "% of full", "measured")]
    for name, shape in _models().items():
        full_bytes = 2 * model_parameters(shape)
        figures.append(Figure(f"{name}: whole", full_bytes / (1 << 30), "GiB", PEERS[name]))
        for line in LINES:
            rate = line * 1e9 / 8
            beside = f"whole {full_bytes / rate:.3g} s; by arithmetic"
            figures.append(Figure(f"{name}: a delta over {line} Gbit/s", full_bytes * share / rate, "s", beside))
    return figures


def _models() -> dict[str, ModelShape]:
    """Qwen3's two mixtures of experts; the larger one by its sizes as they are published."""
    smaller = read_shape(ROOT / "launch" / "models" / "Qwen3-30B-A3B-Base")
    return {"Qwen3-30B-A3B": smaller, "Qwen3-235B-A22B": msgspec.structs.replace(smaller, **LARGER)}


def _share() -> float:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        at, model = Path(directory), Model((UPDATES,))
        base = model.write(at / "base", SHAPES, 0, 0.0, "BF16")
        new = model.write(at / "new", SHAPES, UPDATES, RATE, "BF16")
        report = encode_delta(base, new, at / "delta", base_version=Version(0, 0), version=Version(0, 1), num_threads=2)
        return report.size_bytes / report.full_bytes
