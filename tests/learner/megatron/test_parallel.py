"""How a rank joins: under torchrun, and plainly."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.learner.megatron import tiny

SCRIPT = """
import sys
from common.errors import exit_on_error
with exit_on_error():
    from pathlib import Path
    from learner.megatron.policy import Policy
    from tests.learner.megatron import tiny
    policy = Policy(tiny.config(Path(sys.argv[1])))
    print(policy.update(tiny.micro_batches([9]), tiny.masked_mean_loss).skipped)
"""
TORCHRUN = ["-m", "torch.distributed.run", "--max-restarts=0", "--standalone"]


@pytest.mark.parametrize("launcher", [[], [*TORCHRUN, "--nproc-per-node=1"]], ids=["plain", "torchrun"])
def test_one_rank_trains(launcher: list[str], tmp_path: Path) -> None:
    result = _run(launcher, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["False"]
    assert "Warning" not in result.stderr


def test_two_ranks_are_refused_in_one_line(tmp_path: Path) -> None:
    result = _run([*TORCHRUN, "--nproc-per-node=2"], tmp_path)
    assert result.returncode != 0
    assert "sluice: torchrun --nproc-per-node: found 2 ranks, expected 1" in result.stderr


def _run(launcher: list[str], path: Path) -> subprocess.CompletedProcess[str]:
    tiny.build(path / "model", "qwen3")
    (path / "rank.py").write_text(SCRIPT)
    command = [sys.executable, *launcher, str(path / "rank.py"), str(path / "model")]
    root = Path(__file__).parents[3]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
