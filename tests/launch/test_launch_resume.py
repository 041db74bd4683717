"""A run that goes on in its directory: what the launcher says and refuses before anything starts."""

import fcntl
import json
from pathlib import Path

import pytest

from common.layout import write_resolved
from launch.cluster import resolve
from launch.run_directory import LOCK
from tests.launch.conftest import Cluster

Arguments = tuple[str, ...]


@pytest.fixture
def command(tmp_path: Path, model: Path, prompts: Path) -> Arguments:
    """Of a run in a fixed directory."""
    files = (f"model={model}", f"data.train={prompts}", f"run.dir={tmp_path / 'run'}")
    return ("--layout", "local", *files, "data.max_prompt_tokens=8", "run.resume=auto", "steps=2")


@pytest.fixture
def run_dir(tmp_path: Path, command: Arguments) -> Path:
    """As the command left it, two steps of three done and stopped."""
    directory = tmp_path / "run"
    directory.mkdir()
    write_resolved(resolve("local", [*command[2:], "steps=3"]), directory)
    (directory / LOCK).touch()
    rows = [{"kind": "step", "step": step, "time": 1.0, "seconds": 1.0} for step in (1, 2)]
    rows.append({"kind": "end", "step": 2, "time": 2.0, "reason": "stopped on request"})
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return directory


def said(cluster: Cluster, run_dir: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and the line on stderr; the directory is as it was."""
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    ended = cluster(*arguments)
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if path in before} == before
    assert len(ended.stderr.splitlines()) <= 1
    return ended.returncode, ended.stderr or ended.stdout


def test_a_dry_run_says_what_goes_on_and_what_has_changed(cluster: Cluster, run_dir: Path, command: Arguments) -> None:
    code, text = said(cluster, run_dir, *command, "steps=9", "optimizer.lr=3e-6", "--dry-run")
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == f"# the run in {run_dir} goes on from its newest checkpoint; 2 steps were done"
    assert lines[1] == "# changed: steps: 3 before, 9 now"
    assert lines[2].startswith("# changed: optimizer.lr: ")
    assert "[learner]" in lines


def test_a_new_directory_begins_a_run(cluster: Cluster, tmp_path: Path, command: Arguments) -> None:
    ended = cluster(*command, "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert "goes on" not in ended.stdout
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert "found other files, expected a new or empty directory" in cluster(*command).stderr


def test_what_cannot_go_on_is_one_line_and_the_run_stays(
    cluster: Cluster, run_dir: Path, command: Arguments, prompts: Path
) -> None:
    for key, message in (
        ("seed=1", "seed: found 1, expected 0 as in"),
        ("data.shuffle=false", "data.shuffle: found False, expected True"),
        ("steps=1", "steps: found 1, expected at least 2: so many are done in"),
        ("run.resume=never", "found a run that has ended, expected a new or empty directory, or run.resume=auto"),
    ):
        code, line = said(cluster, run_dir, *command, key)
        assert (code, message in line) == (2, True), line
    with (run_dir / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, line = said(cluster, run_dir, *command)
        assert (code, "found a run at work there, expected none" in line) == (2, True), line


def test_a_run_whose_prompts_are_broken_by_now_stays_as_it_is(
    cluster: Cluster, run_dir: Path, command: Arguments, prompts: Path
) -> None:
    prompts.write_text("{\n")
    ended = cluster(*command, "steps=3")
    assert (ended.returncode, f"{prompts}:1: broken JSON" in ended.stderr) == (2, True), ended.stderr
    assert (run_dir / "metrics.jsonl").exists()
    assert (run_dir / "config.json").exists()


def test_a_complete_run_is_said_to_be(cluster: Cluster, run_dir: Path, command: Arguments) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "end", "step": 2, "time": 2.0, "reason": "all steps are done"}) + "\n")
    code, text = said(cluster, run_dir, *command)
    assert code == 0
    assert text == f"the run in {run_dir} is complete: all 2 steps are done\n"
