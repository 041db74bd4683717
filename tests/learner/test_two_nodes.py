"""Two learner nodes, each with an address and a /dev/shm of its own: each hands out its own part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clocks import PATIENCE_S
from tests.learner.test_publish import make
from tests.system.conftest import REPOSITORY
from tests.system.namespaces import HERE, two_machines, with_own_mounts

pytestmark = [pytest.mark.full, pytest.mark.weights]


def test_each_learner_node_hands_out_its_own_part_and_a_version_is_whole(tmp_path: Path) -> None:
    make(tmp_path, Path("/dev/shm"), host=HERE)
    with two_machines() as names:
        ranks = [start(rank, name, tmp_path) for rank, name in enumerate(names)]
        try:
            for rank in ranks:
                output, _ = rank.communicate(timeout=PATIENCE_S)
                assert rank.returncode == 0, output
        finally:
            for rank in ranks:
                rank.kill()


def start(rank: int, name: str, directory: Path) -> "subprocess.Popen[str]":
    variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": HERE, "MASTER_PORT": 29_500}
    environment = os.environ | {key: str(value) for key, value in variables.items()} | {"GLOO_SOCKET_IFNAME": "cable"}
    script = f"mount -t tmpfs tmpfs /dev/shm && exec {sys.executable} -m tests.learner.node {directory}"
    return subprocess.Popen(
        with_own_mounts(name, script),
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
