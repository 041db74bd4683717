"""`python -m tests.bench weights.beside`: what encoding in a thread, or in a process, costs the training beside it.

The step is that of the tiny model, on one thread; versions of 270 MiB are encoded one after the other meanwhile. What
cores share of the hardware costs the same beside any work: the last figure is beside a process that counts. Medians
over steps; each way has its own process, and the other core of two is free.
"""

import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common.versions import Version
from common.weights.delta import encode_delta
from common.weights.parts import Part
from tests.bench.report import Figure
from tests.bench.weights.synthetic import SHAPES, Model

NUM_STEPS = 12
LAYERS = {name: shape for name, shape in SHAPES.items() if name.startswith("model.layers.")}
PART = dict(list(LAYERS.items())[:80])
_BESIDE = {"thread": "encoding in a thread", "process": "encoding in a process", "count": "a process that counts"}


def run() -> list[Figure]:
    """Alone, then each way."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory, model = Path(name), Model((1,))
        size_bytes = model.write(directory / "base", PART, 0, 0.0, "BF16").size_bytes
        model.write(directory / "new", PART, 1, 1e-6, "BF16")
        seconds = {how: _apart(_median_step, directory, how) for how in ("alone", *_BESIDE)}
    beside = f"parts of {size_bytes >> 20} MiB"
    return [
        Figure("a step alone", 1000 * seconds["alone"], "ms"),
        *(
            Figure(f"the same beside {what}", seconds[how] / seconds["alone"], "x", beside if how != "count" else "")
            for how, what in _BESIDE.items()
        ),
    ]


def _apart(work: Callable[[Path, str], float], directory: Path, how: str) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, directory, how).result()


def _median_step(directory: Path, how: str) -> float:
    step = _make_step(directory / "model")
    over = multiprocessing.get_context("spawn").Event()
    worker = None
    if how == "thread":
        worker = threading.Thread(target=_encode_until, args=(directory, over), daemon=True)
    elif how != "alone":
        work = _encode_until if how == "process" else _count_until
        worker = multiprocessing.get_context("spawn").Process(target=work, args=(directory, over))
    if worker is not None:
        worker.start()
        while not (directory / "delta").exists():
            time.sleep(0.01)
    seconds = [step() for _ in range(NUM_STEPS)]
    over.set()
    if worker is not None:
        worker.join()
        (directory / "delta").unlink()
    return statistics.median(seconds[2:])


def _encode_until(directory: Path, over: threading.Event) -> None:
    with Part.open(directory / "base") as base, Part.open(directory / "new") as new:
        while not over.is_set():
            encode_delta(base, new, directory / "delta", base_version=Version(0, 0), version=Version(0, 1))


def _count_until(directory: Path, over: threading.Event) -> None:
    (directory / "delta").touch()
    while not over.is_set():
        sum(range(1 << 20))


def _make_step(directory: Path) -> Callable[[], float]:
    """A training step, which says what it took."""
    import torch

    from common.config import Config
    from common.learning import LossConfig
    from common.sections import SamplingConfig
    from common.versions import Lineages
    from learner.step import train_step
    from tests.bench.addition import MAX_TOKENS, batches, load_model, sample_groups
    from tests.learner.plain import PlainPolicy

    torch.set_num_threads(1)
    loss = LossConfig(clip_low=0.03, clip_high=0.04, staleness_clip=0.1)
    sampling = SamplingConfig(max_tokens=MAX_TOKENS)
    config = Config(groups_per_step=16, group_size=16, updates_per_step=4, sampling=sampling, loss=loss)
    model, random = load_model(directory, 0), torch.Generator().manual_seed(0)
    policy, prompts = PlainPolicy(model, 1e-4), batches(0, config.groups_per_step)
    groups = sample_groups(model, next(prompts), config.group_size, 0, random)

    def step() -> float:
        began = time.perf_counter()
        train_step(policy, groups, config, Version(0, 0), Lineages())
        return time.perf_counter() - began

    return step
