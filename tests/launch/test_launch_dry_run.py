import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from common.config import Config
from common.layout import load_config
from common.learning import LearnerConfig, LossConfig, ParallelConfig
from common.sections import DataConfig, DataFile, SamplingConfig
from common.shape import read_shape
from launch.checks import count_parameters
from launch.cluster import LAYOUTS
from launch.estimate import rank_memory
from launch.notices import notices
from launch.parameters import model_parameters
from launch.plan import REPOSITORY, derived_numbers, plan_processes
from launch.resolved import to_toml
from launch.tiny_sizes import tiny_shape
from tests.clocks import PATIENCE_S
from tests.launch.conftest import Cluster
from tests.models import write_tiny_model


def test_a_dry_run_shows_the_plan_and_starts_nothing(cluster: Cluster, tmp_path: Path) -> None:
    ended = cluster("--layout", "local", "--dry-run", "max_staleness=2", f"run.dir={tmp_path / 'run'}")
    assert ended.returncode == 0, ended.stderr
    assert "python -m learner.ledger" in ended.stdout
    assert f"verifier-0: python -m verifier {tmp_path / 'run'} verifier-0" in ended.stdout
    assert "generator-0: python -m generator" in ended.stdout
    assert "-m torch.distributed.run --max-restarts=0 --nproc-per-node=1" in ended.stdout
    assert "sequences per step: 256" in ended.stdout
    assert "staleness budget: groups under way, at most: 48" in ended.stdout
    assert "max_staleness = 2" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_a_layout_of_the_same_configuration(tmp_path: Path) -> None:
    config = Config(
        model="m",
        data=DataConfig(
            train=(DataFile(path='a "b".jsonl', reward="math"), DataFile(path="c.jsonl", weight=2.5)),
            chat_template_kwargs={"enable_thinking": False, "two words": 1},
        ),
        sampling=SamplingConfig(stop=("\n\n", "</s>"), stop_token_ids=(3,)),
    )
    layout = tmp_path / "layout.toml"
    layout.write_text(to_toml(config))
    assert load_config(layout, []) == config


@pytest.mark.parametrize(
    "layout", sorted((REPOSITORY / "launch" / "layouts").glob("*.toml")), ids=lambda path: path.stem
)
def test_each_layout_is_valid_and_plans_all_four_roles(layout: Path, tmp_path: Path) -> None:
    config = load_config(layout, [])
    plans = plan_processes(config, tmp_path)
    assert {plan.role for plan in plans} == {"ledger", "learner", "generator", "verifier"}
    assert len({plan.name for plan in plans}) == len(plans) == 2 + config.generator.count + config.verifier.count


def test_overrides_win_over_the_layout(tmp_path: Path) -> None:
    layout = tmp_path / "layout.toml"
    layout.write_text("steps = 3\n[optimizer]\nlr = 1e-3\n")
    config = load_config(layout, ["optimizer.lr=2e-3", "run.name=plain text"])
    assert (config.steps, config.optimizer.lr, config.run.name) == (3, 2e-3, "plain text")


def test_the_numbers_follow_from_the_counts() -> None:
    numbers = derived_numbers(Config(group_size=8, groups_per_step=6, updates_per_step=3, steps=5, max_staleness=0))
    assert numbers["sequences per step"] == 48
    assert numbers["sequences per update"] == 16
    assert numbers["optimizer updates"] == 15
    assert numbers["staleness budget: groups under way, at most"] == 6
    assert numbers["longest sequences per micro-batch"] == 8192 // 2048


def test_the_cost_of_a_reference_is_told_where_one_is_asked_for(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "qwen3_moe", tie_word_embeddings=True)
    shape = read_shape(tmp_path / "model")
    config = Config(loss=LossConfig(kl_coefficient=0.1))
    size = 4 * count_parameters(tmp_path / "model")
    assert rank_memory(config, shape, 0).reference == size
    assert notices(config, shape) == [
        f"loss.kl_coefficient = 0.1: the reference takes {size / (1 << 20):.2f} MiB of host memory on each rank, at "
        "most, and one more forward pass of 256 sequences a step"
    ]
    learner = LearnerConfig(dtype="bfloat16", parallel=ParallelConfig(data=4, expert=4))
    shared = rank_memory(msgspec.structs.replace(config, learner=learner), shape, 0)
    experts = 2 * 4 * 3 * 64 * 32
    assert shared.reference == shared.host - shared.snapshot == size // 2 - 2 * experts * 3 // 4
    assert rank_memory(Config(), shape, 0).reference == 0


def test_what_checkpoints_take_of_the_disk_is_told(cluster: Cluster) -> None:
    changes = ("steps=95", "learner.checkpoint_every=10", "learner.keep_checkpoints=3", "learner.keep_every=20")
    said = cluster("--layout", "local", "--dry-run", *changes, "run.stop_timeout_s=90").stdout
    size = 12 * model_parameters(tiny_shape(0)) / (1 << 20)
    assert f"bytes per checkpoint: {size:.2f} MiB, weights and both moments in float32, every 10 steps" in said
    kept = "3 of the newest, the best, 4 of learner.keep_every and one in the making"
    assert f"{kept} are in the run directory: {9 * size:.2f} MiB at most" in said
    assert f"for those weights: {2 * size + size / 3:.2f} MiB within run.stop_timeout_s = 90" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["updates_per_step=1"], "updates_per_step = 1: the trust-region ratio is 1 by nature"),
        (["loss.clip_high=0.4"], "loss.clip_low = 0.03, loss.clip_high = 0.4: the ratio is a mean"),
        (["sampling.top_p=0.9"], "sampling.top_p = 0.9, sampling.top_k = 0: tokens come from a truncated distribution"),
        (["model=m", "data.train=t"], "data.test is empty: nothing is evaluated"),
        (["loss.shuffle_rewards=true"], "loss.shuffle_rewards = true: a control experiment"),
        (["learner.keep_checkpoints=1"], "learner.keep_checkpoints = 1: where the newest checkpoint is damaged"),
    ],
)
def test_what_an_owner_may_not_expect_is_said(changes: list[str], words: str) -> None:
    assert notices(load_config(LAYOUTS / "local.toml", []), tiny_shape(0)) == []
    (line,) = notices(load_config(LAYOUTS / "local.toml", changes), tiny_shape(0))
    assert line.startswith(words)


def test_what_is_said_at_the_start_is_in_the_dry_run(cluster: Cluster) -> None:
    ended = cluster("--layout", "local", "--dry-run", "updates_per_step=1")
    assert "# note: updates_per_step = 1: the trust-region ratio is 1 by nature" in ended.stdout


def test_a_stray_common_does_not_win(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("common", "launch"):
        stray = tmp_path / "site" / name
        stray.mkdir(parents=True)
        (stray / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    ended = cluster("--layout", "local", "--dry-run", PYTHONPATH=str(tmp_path / "site"))
    assert ended.returncode == 0, ended.stderr


def test_a_stray_common_does_not_win_in_what_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.processes import run_foreground

    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = run_foreground((sys.executable, "-c", "import common; print(common.__file__)"))
    assert found == str(REPOSITORY / "common" / "__init__.py")


def test_the_launcher_starts_without_torch() -> None:
    code = "import sys, launch.cluster, launch.session; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=PATIENCE_S, check=True)
