"""`python -m tests.learner.node DIRECTORY`: a learner rank that publishes on a machine of its own, for `torchrun`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.learner.test_publish import publish_and_pull

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    publish_and_pull(Path(sys.argv[1]))
    others = [path.name for path in Path("/dev/shm").glob(f"sluice-learner-{1 - int(os.environ['RANK'])}-*")]
    assert others == [], "each node keeps its own parts"
    dist.destroy_process_group()
