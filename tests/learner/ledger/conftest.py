"""A tiny model directory, prompts, and groups for the tests of the ledger."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from common import wire
from common.config import Config
from common.layout import write_resolved
from common.rendezvous import RunKeys
from common.sections import DataConfig, LeaseConfig
from common.versions import Version
from common.wire import LeaseKey
from tests.clocks import PATIENCE_S

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PATIENT = LeaseConfig(heartbeat_timeout_s=2 * PATIENCE_S)  # roles that a test drives by hand have no heartbeat
MakeGroup = Callable[..., wire.ScoredGroup]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory with a character tokenizer, a chat template and a supported architecture."""
    path = tmp_path / "model"
    path.mkdir()
    vocab = {chr(c): c - 9 for c in range(9, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "~", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    return path


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    """Writes a JSONL file."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def make_run(
    tmp_path: Path, model_dir: Path, write_rows: Callable[[str, list[dict[str, Any]]], Path]
) -> Callable[..., tuple[Path, Config]]:
    """A run directory with keys and a configuration, over addition prompts."""

    def make(**values: Any) -> tuple[Path, Config]:
        train = write_rows("train.jsonl", [{"prompt": f"{i}+{i}=", "answer": 2 * i} for i in range(20)])
        test = write_rows("test.jsonl", [{"prompt": f"{i}+1=", "answer": i + 1} for i in range(20, 24)])
        data = values.pop("data", DataConfig(train=str(train), test=str(test)))
        defaults: dict[str, Any] = {
            "group_size": 2,
            "groups_per_step": 2,
            "updates_per_step": 1,
            "model": str(model_dir),
            "lease": PATIENT,
        }
        config = Config(data=data, **{**defaults, **values})
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        write_resolved(config, run_dir)
        if not (run_dir / "keys.json").exists():
            RunKeys.create(run_dir)
        return run_dir, config

    return make


@pytest.fixture
def make_group() -> MakeGroup:
    """A scored group: `correct` of each completion (None: its grading failed), all tokens of `version`."""

    def make(key: LeaseKey, version: Version, correct: tuple[float | None, ...] = (1.0, 0.0)) -> wire.ScoredGroup:
        completion = wire.Completion(
            token_ids=wire.int_bytes([1, 2]),
            logprobs=wire.float_bytes([-0.5, -0.25]),
            versions=wire.span_bytes([wire.VersionSpan(2, version)]),
            finish_reason=wire.FinishReason.STOP,
            seed=0,
        )
        group = wire.Group(
            key=key,
            generator="generator-0",
            prompt_id="p",
            answer="1",
            reward="exact",
            completions=tuple(msgspec.structs.replace(completion, seed=i) for i in range(len(correct))),
            seconds=1.0,
        )
        grades = tuple(
            wire.Grade(outcome=wire.Outcome.TIMEOUT, correct=0.0, reward=0.0)
            if value is None
            else wire.Grade(outcome=wire.Outcome.CORRECT if value else wire.Outcome.WRONG, correct=value, reward=value)
            for value in correct
        )
        return wire.ScoredGroup(group=group, grades=grades, verifier="verifier-0")

    return make
