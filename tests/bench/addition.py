"""The task of the staleness study: additions, sampled in batches by plain PyTorch and graded here."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from common import wire
from common.versions import Version
from common.vision import declare_vision_operators
from launch import tiny
from tests.groups import completion, grade, training_group

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

MAX_TOKENS = 4  # three digits and the end
_IDS = {token: i for i, token in enumerate(tiny.TOKENS)}


class Logits(nn.Module):
    """A causal model as `tests.learner.plain.PlainPolicy` takes it: token ids Int[B, L] to logits Float[B, L, V]."""

    def __init__(self, model: "Qwen3ForCausalLM") -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.model(input_ids=token_ids, use_cache=False).logits


def load_model(directory: Path, seed: int) -> Logits:
    """The warmed-up model of a seed, which is built where it is not there yet."""
    if not (directory / "test.jsonl").exists():  # the last file that is written
        tiny.build(directory, seed, num_experts=0)
    declare_vision_operators()
    from transformers import Qwen3ForCausalLM

    return Logits(Qwen3ForCausalLM.from_pretrained(directory / "model", dtype=torch.float32))


def batches(seed: int, num_prompts: int) -> Iterator[list[tiny.Pair]]:
    """Prompts of one step after the other, the same for the same seed."""
    pairs = tiny.split_pairs(seed).train
    rng = np.random.default_rng(seed)
    while True:
        yield [pairs[i] for i in rng.choice(len(pairs), num_prompts, replace=False)]


def sample_groups(
    model: nn.Module, pairs: list[tiny.Pair], group_size: int, number: int, rng: torch.Generator
) -> tuple[wire.TrainingGroup, ...]:
    """A scored group for each pair, sampled under the version of that number."""
    answers, logprobs = _sample(model, [pair for pair in pairs for _ in range(group_size)], rng)
    grouped = zip(pairs, answers.split(group_size), logprobs.split(group_size), strict=True)
    return tuple(_group(pair, rows, values, number, visit) for visit, (pair, rows, values) in enumerate(grouped))


def accuracy(model: nn.Module, pairs: list[tiny.Pair], rng: torch.Generator) -> float:
    """Share of sampled answers that are the sum, one sample of each pair."""
    answers, _ = _sample(model, pairs, rng)
    return float(np.mean([_is_right(pair, _cut(row)) for pair, row in zip(pairs, answers, strict=True)]))


@torch.no_grad()
def _sample(model: nn.Module, pairs: list[tiny.Pair], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Answers Int[B, MAX_TOKENS] at temperature 1, and their logprobs; what is behind an end has no meaning."""
    token_ids = torch.tensor([[_IDS[character] for character in pair.prompt] for pair in pairs])
    chosen = []
    for _ in range(MAX_TOKENS):
        distribution = torch.log_softmax(model(token_ids)[:, -1], -1)
        newest = torch.multinomial(distribution.exp(), 1, generator=rng)
        chosen.append(distribution.gather(1, newest))
        token_ids = torch.cat([token_ids, newest], dim=1)
    return token_ids[:, -MAX_TOKENS:], torch.cat(chosen, dim=1)


def _group(pair: tiny.Pair, answers: Tensor, logprobs: Tensor, number: int, visit: int) -> wire.TrainingGroup:
    tokens = [_cut(row) for row in answers]
    completions = [
        completion(
            row,
            values[: len(row)].numpy(),
            Version(0, number),
            seed=i,
            reason=wire.FinishReason.STOP if row[-1] == tiny.EOS else wire.FinishReason.LENGTH,
        )
        for i, (row, values) in enumerate(zip(tokens, logprobs, strict=True))
    ]
    prompt = [_IDS[character] for character in pair.prompt]
    grades = [grade(float(_is_right(pair, row))) for row in tokens]
    return training_group(prompt, completions, grades, visit=visit, name=pair.prompt, answer=pair.answer)


def _is_right(pair: tiny.Pair, tokens: list[int]) -> bool:
    return tokens == [*(_IDS[character] for character in pair.answer), tiny.EOS]


def _cut(answer: Tensor) -> list[int]:
    """The tokens up to the end, that included."""
    tokens: list[int] = answer.tolist()
    return tokens[: tokens.index(tiny.EOS) + 1] if tiny.EOS in tokens else tokens
