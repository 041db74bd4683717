import asyncio
import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.display import Display, describe, render
from launch.plot import smooth
from launch.progress import Progress
from launch.report import mean_accuracy, read_rows, summarize, write_report

NUM_STEPS = 60
ACCOUNTS = {"trained": 960, "filtered": 130, "unused": 40}


def step_row(step: int, **values: Any) -> dict[str, Any]:
    rng = random.Random(step)
    row = {
        "kind": "step",
        "step": step,
        "steps": NUM_STEPS,
        "time": 1000.0 + 2 * step,
        "seconds": 2.0,
        "reward": 0.3 + 0.5 * (1 - math.exp(-step / 25)) + rng.uniform(-0.06, 0.06),
        "staleness_mean": 1.5 + rng.uniform(-0.5, 0.5),
        "staleness_max": rng.choice([2, 3, 4]),
        "clip_fraction": 0.2 + rng.uniform(-0.05, 0.05),
        "staleness_clip_fraction": 0.08 + rng.uniform(-0.03, 0.03),
        "tokens_per_completion": 3.0,
        "learner_tokens_per_s": 2400.0 + rng.uniform(-300, 300),
        "generator_tokens_per_s": 1700.0 + rng.uniform(-300, 300),
        "verifier_completions_per_s": 600.0,
        "learner_idle": 0.4,
        "generator_idle": 0.1,
        "verifier_idle": 0.9,
        "ledger_idle": None,
        "overlap_share": 0.7,
    }
    return row | values


def evaluation_row(step: int, accuracy: float, source: str = "addition", num_prompts: int = 500) -> dict[str, Any]:
    row = {"kind": "evaluation", "step": step, "time": 0.0, "source": source}
    return row | {"accuracy": accuracy, "num_prompts": num_prompts}


def write_rows(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    rows = [evaluation_row(0, 0.3)]
    for step in range(1, NUM_STEPS + 1):
        rows.append(step_row(step))
        if step % 10 == 0:
            rows.append(evaluation_row(step, 0.3 + 0.5 * (1 - math.exp(-step / 25))))
    end = {"kind": "end", "step": NUM_STEPS, "time": 1121.0, "reason": "all steps are done", "accounts": ACCOUNTS}
    idle = {"learner_idle": 0.35, "generator_idle": 0.12, "verifier_idle": 0.8, "ledger_idle": 0.95}
    end |= idle | {"checkpoint": "/c/step-000060", "overlap_share": 0.75, "learner_wait_share": 0.35}
    write_rows(tmp_path, [*rows, end])
    return tmp_path


def test_a_whole_run_is_summarized(run_dir: Path) -> None:
    text = write_report(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == NUM_STEPS
    assert summary["seconds"] == 2.0 * NUM_STEPS
    assert summary["accuracy_start"] == 0.3
    assert summary["accuracy_end"] == pytest.approx(0.3 + 0.5 * (1 - math.exp(-60 / 25)))
    assert 1.0 < summary["staleness_mean"] < 2.0
    assert summary["staleness_max"] == 4
    assert summary["groups"] == ACCOUNTS
    assert summary["checkpoint"] == "/c/step-000060"
    assert summary["idle"] == {"learner": 0.35, "generator": 0.12, "verifier": 0.8, "ledger": 0.95}
    assert (summary["overlap_share"], summary["learner_wait_share"]) == (0.75, 0.35)
    assert f"plot: {run_dir / 'plot.png'}" in text
    assert "checkpoint: /c/step-000060" in text
    assert (run_dir / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_killed_is_summarized_from_its_steps(tmp_path: Path) -> None:
    write_rows(tmp_path, [step_row(1), step_row(2)])
    write_report(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ended"] == "stopped before its end"
    assert summary["accuracy_end"] is None
    assert summary["idle"] == {"learner": 0.4, "generator": 0.1, "verifier": 0.9, "ledger": None}
    assert summary["learner_wait_share"] == 0.4
    assert summary["groups"] == {}


def test_prompts_that_were_given_up_are_counted_from_the_accounts_or_the_last_step(tmp_path: Path) -> None:
    write_rows(tmp_path, [step_row(1, quarantined=0), step_row(2, quarantined=3)])
    text = write_report(tmp_path)
    assert f"quarantined: 3 prompts; why: python -m learner.ledger --audit {tmp_path}" in text.splitlines()
    assert json.loads((tmp_path / "summary.json").read_text())["quarantined"] == 3
    end = {"kind": "end", "step": 2, "time": 1.0, "reason": "all steps are done", "accounts": {"quarantined": 1}}
    write_rows(tmp_path, [step_row(1, quarantined=0), end])
    assert "quarantined: 1 prompt;" in write_report(tmp_path)


def test_a_run_that_gave_nothing_up_says_nothing_of_it(run_dir: Path) -> None:
    assert "quarantined" not in write_report(run_dir)


def test_a_run_that_went_on_after_an_end_is_not_told_to_have_ended_there(tmp_path: Path) -> None:
    stopped = {"kind": "end", "step": 1, "time": 1.0, "reason": "stopped on request", "accounts": ACCOUNTS}
    write_rows(tmp_path, [step_row(1), stopped, step_row(2)])
    write_report(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["ended"] == "stopped before its end"


def test_a_run_without_a_step_has_no_report(tmp_path: Path) -> None:
    assert write_report(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_was_repeated_after_a_crash_counts_once(tmp_path: Path) -> None:
    write_rows(tmp_path, [step_row(1), step_row(2, reward=0.1), step_row(2, reward=0.9, time=1010.0)])
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows.steps] == [1, 2]
    assert summarize(rows)["reward_end"] == 0.9


def test_accuracy_over_several_sources_counts_each_prompt_alike() -> None:
    rows = [evaluation_row(0, 0.5, "a", 100), evaluation_row(0, 1.0, "b", 300), evaluation_row(10, 0.6, "a", 100)]
    assert mean_accuracy(rows) == {0: 0.875, 10: 0.6}


def test_smoothing_skips_what_is_missing() -> None:
    smoothed = smooth([math.nan, 1.0, math.nan, 2.0])
    assert math.isnan(smoothed[0])
    assert smoothed[1:] == pytest.approx([1.0, 1.0, 1.2])


def test_progress_reads_only_what_is_new(tmp_path: Path) -> None:
    progress = Progress(tmp_path, 10)
    assert progress.read() == []
    assert math.isnan(progress.seconds_left)
    write_rows(tmp_path, [evaluation_row(0, 0.25), step_row(1, seconds=4.0)])
    assert len(progress.read()) == 2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_row(2, seconds=2.0)) + '\n{"kind": "st')
    assert [row["step"] for row in progress.read()] == [2]
    assert (progress.step, progress.seconds_left) == (2, 8 * 3.0)
    assert progress.accuracy == {"addition": 0.25}


def test_a_step_is_one_line_where_there_is_no_terminal() -> None:
    line = describe(step_row(7, reward=0.5, staleness_mean=1.25, staleness_max=3, generator_tokens_per_s=1500.0), 60)
    assert line.startswith("step 7/60: reward 0.500, staleness 1.25 (max 3), generator 1,500 tokens/s, learner 2,")
    assert "idle: learner 40%, generator 10%, verifier 90%, ledger ?" in line
    assert describe(evaluation_row(10, 0.5), 60) == "step 10: held-out accuracy 0.500 (addition)"
    assert describe({"kind": "end"}, 60) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_what_the_learner_tells_people_is_a_line_each(tmp_path: Path, terminal: bool) -> None:
    log = tmp_path / "logs" / "learner-0.jsonl"
    log.parent.mkdir()
    log.write_text('{"event": "kernels", "chosen": {"norm": "torch"}}\n')
    progress = Progress(tmp_path, 10)
    progress.read()  # of an earlier run
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=100)
    damaged = {"event": "checkpoint_damaged", "checkpoint": "step-000020", "instead": "step-000010"}
    damaged |= {"kept_as": "damaged-step-000020", "damage": "a: found 1 bytes, expected the 2 that were written"}

    async def follow() -> None:
        following = asyncio.create_task(Display(console).follow(progress))
        await asyncio.sleep(0)
        with log.open("a") as file:
            file.write('{"event": "kernels", "chosen": {"core_attention": "torch SDPA", "adam": "torch"}}\n')
            file.write(json.dumps(damaged) + '\n{"event": "begins_afresh", "version": "1.0"}\n')
            file.write('{"event": "ready"}\n{"event": "ker')
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    asyncio.run(follow())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.findall(r"(?:the learner's kernels|the checkpoint|no checkpoint)\b.*?$", shown, re.MULTILINE) == [
        "the learner's kernels: core attention torch SDPA, adam torch",
        "the checkpoint step-000020 is damaged, the learner goes on from step-000010 (kept as damaged-step-000020): "
        "a: found 1 bytes, expected the 2 that were written",
        "no checkpoint to go on from: the learner begins with the starting weights, the ledger serves all again",
    ]


def test_a_terminal_shows_progress_and_each_role(run_dir: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100)
    progress = Progress(run_dir, 100)
    console.print(render(progress))
    progress.read()
    console.print(render(progress))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    fragments = ("starting", "step 60 of 100", "0:01:20 left", "held-out accuracy, addition", "reward", "staleness")
    for fragment in (*fragments, "generator", "tokens/s", "completions/s", "90%"):
        assert fragment in shown


def test_notices_are_not_read_as_markup() -> None:
    console = Console(file=io.StringIO())
    Display(console).notice("[rank0] died: [/bold]")
    assert console.file.getvalue() == "[rank0] died: [/bold]\n"  # type: ignore[attr-defined]
