"""`python -m launch.tiny DIR --seed N [--experts E]`: a tiny model and its task, for a real run on any machine.

The task is to add two numbers below 100: "07+45=" asks for "52". The model is a Qwen3 of two layers with a vocabulary
of characters, or a Qwen3-MoE with E experts a layer, two of them for each token. Its warm-up imitates demonstrations
with a systematic slip, carries that are dropped more often than not, so that it adds well where nothing carries and
badly elsewhere: what is left is for reinforcement learning to find.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from common.errors import ModelError, exit_on_error
from common.vision import declare_vision_operators
from launch.tiny_sizes import tiny_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAD, EOS = 0, 1
TOKENS = ("<pad>", "<eos>", *"0123456789+= ", "<unk>")
_IDS = {token: i for i, token in enumerate(TOKENS)}
_PROMPT_TOKENS, _ANSWER_TOKENS = 6, 4
_NUM_TEST, _NUM_VALIDATION = 500, 300
_BATCH = 256
_SLIP = 0.85
_LR, _LR_WARMUP = 1e-3, 50
_MIN_STEPS, _MAX_STEPS, _CHECK_EVERY = 400, 800, 25
_ENOUGH, _TOO_GOOD = 0.95, 0.45


class Pair(NamedTuple):
    """Two numbers to add."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        """Both operands with two digits, so that all prompts have the same length."""
        return f"{self.a:02}+{self.b:02}="

    @property
    def answer(self) -> str:
        """The sum."""
        return str(self.a + self.b)

    @property
    def carries(self) -> bool:
        """Whether a carry is needed: the part that the warm-up teaches badly."""
        return self.a % 10 + self.b % 10 >= 10 or self.a + self.b >= 100


class Split(NamedTuple):
    """Pairs to train on, to check the warm-up with, and to evaluate the run with."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


def main() -> None:
    """Builds DIR/model, DIR/train.jsonl and DIR/test.jsonl."""
    parser = argparse.ArgumentParser(prog="python -m launch.tiny", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="made if it does not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the demonstrations")
    parser.add_argument("--experts", type=int, default=0, help="of each layer; 0 builds a dense model")
    arguments = parser.parse_args()
    build(arguments.directory, arguments.seed, arguments.experts)


def build(directory: Path, seed: int, num_experts: int) -> None:
    """Writes the model, its tokenizer and the prompts to `directory`.

    Raises:
        ModelError: The warm-up did not end where it should: the model cannot add, or adds too well.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    began = time.monotonic()
    split = split_pairs(seed)
    model = _new_model(num_experts)
    num_steps = _warm_up(model, split, random.Random(seed))  # noqa: S311
    accuracy = _accuracy(model, split.validation)
    if accuracy > _TOO_GOOD:
        raise ModelError(
            f"seed {seed}: found an accuracy of {accuracy:.2f} after the warm-up, expected at most {_TOO_GOOD}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory / "model")
    save_tokenizer(directory / "model")
    _write_rows(directory / "train.jsonl", split.train)
    _write_rows(directory / "test.jsonl", split.test)
    seconds = time.monotonic() - began
    sys.stdout.write(f"{num_steps} warm-up steps in {seconds:.0f} s, held-out accuracy {accuracy:.2f}\n")


def split_pairs(seed: int) -> Split:
    """All 10,000 pairs, split so that nothing held out is trained on, with its operands swapped neither."""
    rng = random.Random(seed)  # noqa: S311
    unordered = [Pair(a, b) for a in range(100) for b in range(a, 100)]
    rng.shuffle(unordered)
    held_out = [Pair(b, a) if rng.random() < 0.5 else Pair(a, b) for a, b in unordered[: _NUM_TEST + _NUM_VALIDATION]]
    train = [pair for a, b in unordered[_NUM_TEST + _NUM_VALIDATION :] for pair in {Pair(a, b), Pair(b, a)}]
    return Split(sorted(train), held_out[_NUM_TEST:], held_out[:_NUM_TEST])


def slipped_sum(pair: Pair, rng: random.Random) -> int:
    """The sum as a demonstration gives it: the unit's carry, and then the hundred, each forgotten with `_SLIP`."""
    total = pair.a + pair.b
    if pair.a % 10 + pair.b % 10 >= 10 and rng.random() < _SLIP:
        total -= 10
    if total >= 100 and rng.random() < _SLIP:
        total -= 100
    return total


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of characters, as AutoTokenizer and the ledger load it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(_IDS, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=TOKENS[PAD],
        eos_token=TOKENS[EOS],
        unk_token=TOKENS[-1],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def _new_model(num_experts: int) -> "PreTrainedModel":
    declare_vision_operators()
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    options = tiny_sizes(num_experts) | _rest()
    if not num_experts:
        return Qwen3ForCausalLM(Qwen3Config(**options))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options))


def _rest() -> dict[str, Any]:
    """What its configuration says beside the sizes."""
    return {
        "initializer_range": 0.05,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "dtype": "float32",
    }


def _warm_up(model: "PreTrainedModel", split: Split, rng: random.Random) -> int:
    """Imitates slipped demonstrations until sums without a carry are right; returns the number of steps.

    Raises:
        ModelError: They never were.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / _LR_WARMUP))
    easy = [pair for pair in split.validation if not pair.carries]
    accuracy = 0.0
    for step, batch in enumerate(_batches(split.train, rng), start=1):
        token_ids, labels = _demonstrations(batch, rng)
        model(input_ids=token_ids, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step >= _MIN_STEPS and step % _CHECK_EVERY == 0:
            accuracy = _accuracy(model, easy)
            if accuracy >= _ENOUGH:
                return step
        if step == _MAX_STEPS:
            break
    raise ModelError(
        f"found an accuracy of {accuracy:.2f} on sums without a carry after {_MAX_STEPS} warm-up steps, "
        f"expected {_ENOUGH}"
    )


def _batches(pairs: list[Pair], rng: random.Random) -> Iterator[list[Pair]]:
    while True:
        yield rng.sample(pairs, _BATCH)


def _demonstrations(pairs: list[Pair], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Int[B, T] token ids, and Int[B, T] labels that are -100 where nothing is to be learned."""
    rows = [[*_encode(f"{pair.prompt}{slipped_sum(pair, rng)}"), EOS] for pair in pairs]
    length = _PROMPT_TOKENS + _ANSWER_TOKENS
    token_ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    labels = token_ids.masked_fill(token_ids == PAD, -100)
    labels[:, :_PROMPT_TOKENS] = -100
    return token_ids, labels


@torch.no_grad()
def _accuracy(model: "PreTrainedModel", pairs: list[Pair]) -> float:
    """Share of greedy answers that are the sum."""
    token_ids = torch.tensor([_encode(pair.prompt) for pair in pairs])
    for _ in range(_ANSWER_TOKENS):
        newest = model(input_ids=token_ids).logits[:, -1].argmax(-1, keepdim=True)
        token_ids = torch.cat([token_ids, newest], dim=1)
    expected = [[*_encode(pair.answer), EOS] for pair in pairs]
    answers = token_ids[:, _PROMPT_TOKENS:].tolist()
    return sum(a[: len(e)] == e for a, e in zip(answers, expected, strict=True)) / len(pairs)


def _encode(text: str) -> list[int]:
    return [_IDS[character] for character in text]


def _write_rows(path: Path, pairs: list[Pair]) -> None:
    rows = ({"prompt": p.prompt, "answer": p.answer, "data_source": "exact"} for p in pairs)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    with exit_on_error():
        main()
