"""A checkpoint of 1 GiB: writing it, its checksums, and checking them before it is loaded; one rank."""

import tempfile
import time
from pathlib import Path

from common.rendezvous import RunKeys
from common.versions import Version
from learner.checkpoints import Checkpoints
from learner.ranks import Ranks
from tests.bench.report import Figure
from tests.learner.saves import Weights, commit, make_config

NUM_TENSORS = 1024  # of 1 MiB
REPEATS = 3


def run() -> list[Figure]:
    """The best of several saves, and of as many loads that the page cache serves."""
    policy, found = Weights(1, NUM_TENSORS), list[tuple[float, float, float]]()
    for number in range(1, REPEATS + 1):
        with tempfile.TemporaryDirectory() as directory:
            RunKeys.create(Path(directory))
            checkpoints = Checkpoints(make_config(Path(directory)), Path(directory), Ranks())
            checkpoints.save(policy, Version(0, number), commit(number))
            saved = checkpoints.finish()
            assert saved is not None
            began = time.monotonic()
            assert checkpoints.fallback.find() is not None
            found.append((saved.write_s, saved.checksum_s, time.monotonic() - began))
    write_s, checksum_s, check_s = (min(values) for values in zip(*found, strict=True))
    return [
        Figure("a checkpoint of 1 GiB, written beside training", write_s, "s"),
        Figure("of it the checksums", checksum_s, "s", "each rank its own files"),
        Figure("checking them before it is loaded", check_s, "s", "the ranks share the files"),
    ]
