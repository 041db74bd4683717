"""The main job, for a few steps: what it writes, and what a user does with it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.layout import read_resolved
from common.vision import declare_vision_operators
from tests.models import write_tiny_model
from tests.system.conftest import Run

SHORT = ("steps=6", "evaluation.every=3", "learner.checkpoint_every=3")
STEP_KEYS = set(
    """
    step steps lineage time seconds wait_s update_s publish_s checkpoint_s recompute_s
    forward_backward_s optimizer_s export_s reward correct num_groups
    num_completions num_late num_masked num_tokens tokens_per_completion staleness_mean staleness_max loss grad_norm lr
    clip_fraction clip_fraction_low clip_fraction_high staleness_clip_fraction ratio_mean weight_mean weight_min
    weight_max staleness_ratio_min staleness_ratio_max clip_fraction_at_staleness_0 clip_fraction_at_length_q1
    logprob_difference_k3 num_rejected overlong_penalty noise_floor num_masked_timeout num_masked_error
    num_masked_truncated num_groups_right num_groups_wrong filtered_right filtered_wrong
    effective_sample_share entropy logprob_difference_mean logprob_difference_p99 skipped_updates
    nonfinite_updates
    learner_tokens_per_s generator_tokens_per_s verifier_completions_per_s learner_idle generator_idle
    verifier_idle ledger_idle overlap_share filtered quarantined waiting leased scored epoch epochs pin_wait_s refused
    snapshot_s probe_s encode_wait_s encode_s delta_share changed_share
    weights_transfer_s weights_decode_s weights_pause_s weights_pulled_bytes
    num_groups_expired expired_tokens_p50 expired_tokens_p90 expired_tokens_max
    """.split()  # noqa: SIM905
)


def test_a_run_ends_by_itself_and_writes_what_it_promises(start_run: Callable[..., Run]) -> None:
    run = start_run(*SHORT)
    assert run.wait() == 0
    run.assert_sound()
    summary = run.summary()
    assert summary["steps"] == 6
    # The warm-up ends with at most 0.45 on 300 other sums and 0.95 on those without a carry, which are a third: five
    # standard deviations of the difference are 0.18 and 0.13.
    assert 0.18 <= summary["accuracy_start"] <= 0.63
    assert {"seconds", "accuracy_end", "staleness_mean", "staleness_max", "checkpoint"} <= set(summary)
    assert set(summary["idle"]) == {"learner", "generator", "verifier", "ledger"}
    assert all(0 <= share <= 1 for share in summary["idle"].values())
    assert 0 < summary["overlap_share"] < 1
    assert summary["epoch"] == run.rows("step")[-1]["epoch"] > 0
    _check_metrics(run)
    _check_samples(run)
    _check_files(run)
    _check_checkpoint(Path(summary["checkpoint"]))
    assert "step 6/6: reward" in run.output()
    assert "the learner's kernels: core attention torch SDPA, norm torch," in run.output()
    assert str(summary["checkpoint"]) in run.output()


def _check_metrics(run: Run) -> None:
    steps = run.rows("step")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        assert not STEP_KEYS - set(row)
        assert row["skipped_updates"] == 0
        assert row["staleness_max"] <= 4
        assert row["num_completions"] == 256
        assert row["logprob_difference_mean"] < 0.5
    assert steps[0]["logprob_difference_p99"] < 2.0
    assert set(run.accuracies()) == {0, 3, 6}


def _check_samples(run: Run) -> None:
    samples = [json.loads(line) for line in (run.directory / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 * 16
    for sample in samples:
        text = sample["text"].removesuffix("<eos>")
        assert (sample["reward"] == 1) == (text == sample["answer"]), sample
        assert sample["prompt"].endswith("=")
        assert sample["versions"][-1][0] > 0


def _check_files(run: Run) -> None:
    assert (run.directory / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert list((run.directory / "tensorboard").glob("events*"))
    assert read_resolved(run.directory).steps == 6
    logs = {path.name for path in (run.directory / "logs").iterdir()}
    assert {"ledger.jsonl", "learner-0.jsonl", "generator-0.jsonl", "verifier-0.jsonl"} <= logs
    best = (run.directory / "checkpoints" / "best").resolve()
    assert best.name in ("step-000003", "step-000006")


def _check_checkpoint(path: Path) -> None:
    """transformers loads it, and it is not the model that the run began with."""
    declare_vision_operators()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = read_resolved(path.parents[2])
    began = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    moved = [float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), began.parameters(), strict=True)]
    assert 0 < max(moved) < 0.1
    # Of the sums without a carry, some 170, the warm-up leaves 95 % right, on whatever processor.
    rows = [json.loads(line) for line in Path(config.data.test[0].path).read_text().splitlines()]
    easy = [row for row in rows if _needs_no_carry(row["prompt"])]
    ids = tokenizer([row["prompt"] for row in easy], return_tensors="pt", add_special_tokens=False).input_ids
    answers = tokenizer.batch_decode(model.generate(ids, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :])
    right = [answer.startswith(row["answer"]) for answer, row in zip(answers, easy, strict=True)]
    assert sum(right) > len(right) / 2 > 50


def _needs_no_carry(prompt: str) -> bool:
    a, b = map(int, prompt.removesuffix("=").split("+"))
    return a % 10 + b % 10 < 10 and a + b < 100


def test_a_mixture_of_experts_trains_on_a_file_prepared_for_verl(start_run: Callable[..., Run], tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    model = write_tiny_model(tmp_path / "moe", "qwen3_moe")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    (model / "chat_template.jinja").write_text(template)
    # An untrained model answers at random: a reference of every digit makes some of its groups differ.
    rows = [
        {
            "data_source": "exact",
            "prompt": [{"role": "user", "content": f"{i // 10}+{i % 10}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i % 10)},
            "extra_info": {"index": i},
        }
        for i in range(60)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "z+z=", "answer": "7"}\n{"prompt": "y+y=", "answer": "8"}\n')
    run = start_run(
        f"model={model}",
        f"data.train={tmp_path / 'train.parquet'}",
        f"data.test=[{{path='{held_out}', name='a'}}, {{path='{held_out}', name='b'}}]",
        "evaluation.num_samples=8",
        "evaluation.sampling.temperature=1.0",
        "evaluation.every=2",
        "sampling.max_tokens=2",
        f"sampling.stop_token_ids={list(range(2, 12))}",
        "sampling.stop=['3']",
        "steps=2",
        "groups_per_step=4",
        "group_size=64",
        "learner.checkpoint_every=2",
        "generator.gate_max=10",  # where a router is undecided to the last bit, the engine may choose otherwise
    )
    assert run.wait() == 0
    run.assert_sound()
    assert all(row["grad_norm"] > 0 for row in run.rows("step"))
    evaluations = {(row["step"], row["source"]): row for row in run.rows("evaluation")}
    assert set(evaluations) == {(step, source) for step in (0, 2) for source in "ab"}
    assert all(row["num_samples"] == 8 and row["num_prompts"] == 2 for row in evaluations.values())
    assert all(row["pass_at_k"] >= row["accuracy"] for row in evaluations.values())
    texts = [json.loads(line)["text"] for line in (run.directory / "samples.jsonl").read_text().splitlines()]
    assert not any(text.startswith("3") and len(text) > 1 for text in texts), "a stop string ends a response"
    declare_vision_operators()
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(run.summary()["checkpoint"], dtype=torch.float32)
    began = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = dict(began.named_parameters())
    moved = {name: float((weight - before[name]).detach().abs().max()) for name, weight in trained.named_parameters()}
    assert all(np.isfinite(list(moved.values())))
    assert any(moved[name] > 0 for name in moved if "experts" in name)
