"""A run directory with a tiny tokenizer, and groups to grade."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common import wire
from common.config import Config
from common.layout import write_resolved
from common.rendezvous import RunKeys
from common.sections import VerifierConfig
from common.versions import Version
from tests.clocks import PATIENCE_S

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def find_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes import what the tests import."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """A character tokenizer with an end token, saved in a model directory."""
    characters = Tokenizer(models.BPE({chr(c): c - 32 for c in range(32, 127)}, []))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens(["<|end|>"])
    (tmp_path / "model").mkdir()
    characters.save(str(tmp_path / "model" / "tokenizer.json"))
    return characters


@pytest.fixture
def make_run(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """A run directory with a configuration of the verifier."""

    def make(**values: Any) -> Path:
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        RunKeys.create(run_dir)
        config = Config(model=str(tmp_path / "model"), verifier=VerifierConfig(**{"deadline_s": PATIENCE_S, **values}))
        write_resolved(config, run_dir)
        return run_dir

    return make


@pytest.fixture
def make_group(tokenizer: Tokenizer) -> Callable[..., wire.Group]:
    """The responses as a group for the reference answer 42, each ended by the end token."""

    def make(*responses: str, visit: int = 1, reward: str = "math") -> wire.Group:
        return wire.Group(
            key=wire.LeaseKey(visit, 1),
            generator="generator-0",
            prompt_id="train:1",
            answer="42",
            reward=reward,
            completions=tuple(_completion(tokenizer.encode(text + "<|end|>").ids) for text in responses),
            seconds=0.5,
        )

    return make


def _completion(token_ids: list[int]) -> wire.Completion:
    return wire.Completion(
        token_ids=wire.int_bytes(token_ids),
        logprobs=wire.float_bytes([-0.5] * len(token_ids)),
        versions=wire.span_bytes([wire.VersionSpan(len(token_ids), Version(0, 3))]),
        finish_reason=wire.FinishReason.STOP,
        seed=1,
    )
