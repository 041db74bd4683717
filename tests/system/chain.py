"""A model whose next token depends on the last one alone: a prompt's last character says how long it answers."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models import VOCABULARY, write_tiny_model

EOS = 1
NUM_PROMPTS, NUM_LONG = 100, 10
LONG_FACTOR = 50
SHORT_TOKENS = 2.2  # of a short answer, its end included, in the mean
_IMPOSSIBLE = -40.0


def write_chain(directory: Path) -> Path:
    """A Qwen3 and `train.jsonl`: the first `NUM_LONG` of its prompts are answered 50 times longer than the rest.

    Attention and feed-forward parts add nothing, embeddings are one-hot, and the head's columns are the logits of what
    follows each token. Prompts end with `a` or `b`, answers are of two letters each.
    """
    model = write_tiny_model(directory / "model", "qwen3", max_position_embeddings=4096)
    path = model / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name].zero_()
    size = len(weights["model.embed_tokens.weight"])
    weights["model.embed_tokens.weight"] = torch.eye(size)
    weights["lm_head.weight"] = (_logits(size) / size**0.5).T.contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    rows = [{"prompt": f"{i:03}{'b' if i < NUM_LONG else 'a'}", "answer": "x"} for i in range(NUM_PROMPTS)]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def is_long(prompt_id: str) -> bool:
    """Whether a prompt asks for a long answer, by its id, which ends with its line."""
    return int(prompt_id.rpartition("/")[2]) <= NUM_LONG


def _logits(size: int) -> torch.Tensor:
    """Of the next token, by the last one: from `a` to `c` and `d`, from `b` to `e` and `f`, and there to the end."""
    logits = torch.full((size, size), _IMPOSSIBLE)
    for first, letters, num_tokens in (("a", "cd", SHORT_TOKENS), ("b", "ef", SHORT_TOKENS * LONG_FACTOR)):
        stop = 1 / (num_tokens - 1)  # after the first letter
        among = [VOCABULARY.index(letter) for letter in letters]
        logits[VOCABULARY.index(first), among] = 0.0
        for last in among:
            logits[last, among] = torch.tensor((1 - stop) / 2).log()
            logits[last, EOS] = torch.tensor(stop).log()
    return logits
