"""`python -m tests.bench weights.codec`: deltas between versions of a model, their size, and how fast they are made.

GB/s are of the full tensors. Encoding includes the checksums of all tensors, applying includes checking them. Each is
the best of some times; parts and deltas are in memory-backed files.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.versions import Version
from common.weights.delta import Delta, apply_delta, encode_delta
from common.weights.parts import WORDS, DType, Part, part_header
from tests.bench.report import Figure
from tests.bench.weights.synthetic import MIXTURE, NUM_EXPERTS, SHAPES, Model, bfloat16, is_touched

UPDATES, RATES = (1, 4, 8), (1e-6, 1e-5)
REPEATS = 3
PEERS = "NeMo-RL 1.06 % of full at 0.33 GB/s, slime 1.7 % at 0.41 GB/s (1.2 % change)"
_PEERS_NAME = "1 update at 1e-06"
_SMALL = {f"small.{i}": (2, 1024) for i in range(20_000)}
_FLOATS = {f"layer.{i}": (4096, 4096) for i in range(4)}
MIXTURE_NAME = f"a mixture of {NUM_EXPERTS} experts of which a tenth is touched"
_BASE, _NEW = Version(0, 0), Version(0, 1)


@dataclass(frozen=True)
class Measured:
    """A delta between two versions.

    Attributes:
        name: What it is between.
        changed: Share of its elements.
        share: Bytes of the delta, of the part's.
        bound: Entropy of positions (in each tensor) and of differences (of all), of the part's bytes.
        loose_bound: The same where each element of the part changes with the same probability.
        encode: Bytes of the part a second, by number of threads.
        decode: The same, for patching and checking.
    """

    name: str
    changed: float
    share: float
    bound: float
    loose_bound: float
    encode: dict[int, float]
    decode: dict[int, float]


def run() -> list[Figure]:
    """The synthetic model, then many small tensors, float32, and the tiny model."""
    figures: list[Figure] = []
    for m in measure():
        figures += [
            Figure(f"{m.name}: elements that change", 100 * m.changed, "%"),
            Figure(f"{m.name}: bytes of the delta", 100 * m.share, "% of full", PEERS if m.name == _PEERS_NAME else ""),
            Figure(f"{m.name}: of the entropy of positions and values", m.share / m.bound, "x"),
            Figure(f"{m.name}: of that with positions anywhere alike", m.share / m.loose_bound, "x"),
        ]
        for what, rates in (("encode", m.encode), ("decode", m.decode)):
            figures += [
                Figure(f"{m.name}: {what}, {n} thread{'s' * (n > 1)}", r / 1e9, "GB/s") for n, r in rates.items()
            ]
    return figures


def measure() -> Iterator[Measured]:
    """Everything, one after the other; 3 GiB of memory-backed files at a time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        at = Path(directory)
        model = Model(UPDATES)
        base = model.write(at / "base", SHAPES, 0, 0.0, "BF16")
        for lr in RATES:
            for updates in UPDATES:
                new = model.write(at / "new", SHAPES, updates, lr, "BF16")
                yield _measure(f"{updates} update{'s' * (updates > 1)} at {lr:.0e}", base, new)
        for name, shapes, dtype in (
            ("4 updates at 1e-6, 20,000 tensors of 4 KiB", _SMALL, "BF16"),
            ("4 updates at 1e-6, float32", _FLOATS, "F32"),
        ):
            base, new = (model.write(at / w, shapes, n, 1e-6, dtype) for w, n in (("base", 0), ("new", 4)))
            yield _measure(name, base, new)
        base = model.write(at / "base", MIXTURE, 0, 0.0, "BF16")
        new = model.write(at / "new", MIXTURE, 1, 1e-6, "BF16", is_touched)
        yield _measure(f"{MIXTURE_NAME}: 1 update at 1e-6", base, new)
        yield from _tiny(at)


def _measure(name: str, base: Part, new: Part) -> Measured:
    full_bytes, target, copy = new.size_bytes, new.path.with_name("delta"), new.path.with_name("copy")
    encode: dict[int, float] = {}
    decode: dict[int, float] = {}
    for num_threads in (1, 2):
        seconds: list[tuple[float, float]] = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            report = encode_delta(base, new, target, base_version=_BASE, version=_NEW, num_threads=num_threads)
            encoded = time.perf_counter() - began
            shutil.copyfile(base.path, copy)
            began = time.perf_counter()
            with Part.open(copy, writable=True) as part:
                apply_delta(part, Delta.open(target), num_threads=num_threads)
            seconds.append((encoded, time.perf_counter() - began))
        encode[num_threads], decode[num_threads] = (full_bytes / min(times) for times in zip(*seconds, strict=True))
    changed = report.num_changed / report.num_elements
    bounds = (bound / full_bytes for bound in _bounds(base, new))
    return Measured(name, changed, report.size_bytes / full_bytes, *bounds, encode, decode)


def _bounds(base: Part, new: Part) -> tuple[float, float]:
    """Bytes: which elements of a tensor, or of the part, change, if each does alike, and by how many units."""
    bits = 0.0
    num_changed_of_all = num_of_all = 0
    differences: list[NDArray[np.uint32]] = []
    for name in new.entries:
        old, words = base.words(name), new.words(name)
        changed = words != old
        num_changed = np.count_nonzero(changed)
        bits += _entropy(np.array([num_changed, words.size - num_changed]))
        num_changed_of_all, num_of_all = num_changed_of_all + num_changed, num_of_all + words.size
        differences.append((words[changed] - old[changed]).astype(np.uint32))
    _, counts = np.unique(np.concatenate(differences), return_counts=True)
    values, loose = _entropy(counts), _entropy(np.array([num_changed_of_all, num_of_all - num_changed_of_all]))
    return (bits + values) / 8, (loose + values) / 8


def _entropy(counts: NDArray[np.int64]) -> float:
    """Bits of so many symbols of each kind."""
    some = counts[counts > 0].astype(np.float64)
    return float(-(some * np.log2(some / some.sum())).sum())


def _tiny(at: Path) -> Iterator[Measured]:
    """Consecutive versions of the tiny model: GSPO on its own samples, as the local layout has it."""
    import torch

    from common.config import Config
    from common.learning import LossConfig
    from common.sections import SamplingConfig
    from common.versions import Lineages
    from learner.step import train_step
    from tests.bench.addition import MAX_TOKENS, batches, load_model, sample_groups
    from tests.learner.plain import PlainPolicy

    torch.set_num_threads(1)
    config = Config(
        groups_per_step=16,
        group_size=16,
        updates_per_step=4,
        sampling=SamplingConfig(max_tokens=MAX_TOKENS),
        loss=LossConfig(clip_low=0.03, clip_high=0.04, staleness_clip=0.1),
    )
    model = load_model(at / "tiny", 0)
    policy, prompts, random = (
        PlainPolicy(model, 1e-4),
        batches(0, config.groups_per_step),
        torch.Generator().manual_seed(0),
    )
    versions: list[dict[str, NDArray[np.float32]]] = []
    for number in range(4):
        groups = sample_groups(model, next(prompts), config.group_size, number, random)
        train_step(policy, groups, config, Version(0, number), Lineages())
        versions.append({name: tensor.numpy().copy() for name, tensor in model.model.state_dict().items()})
    for dtype in ("F32", "BF16"):
        old, new = (_write(at / f"tiny-{dtype}-{i}", versions[i], dtype) for i in (2, 3))
        yield _measure(f"tiny model, one step of 4 updates at 1e-4, {dtype}", old, new)


def _write(path: Path, tensors: dict[str, NDArray[np.float32]], dtype: DType) -> Part:
    header, entries = part_header([(name, dtype, tensor.shape) for name, tensor in tensors.items()])
    flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
    words = {n: bfloat16(values) if dtype == "BF16" else values.view(WORDS["F32"]) for n, values in flat.items()}
    path.write_bytes(header + b"".join(words[entry.name].tobytes() for entry in entries))
    return Part.open(path)
