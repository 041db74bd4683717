"""A model whose next token depends on the last one alone, by a table: some of its answers never end."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models import VOCABULARY

END, SHORT, ENDLESS, EITHER = (VOCABULARY.index(token) for token in ("<eos>", "a", "b", "="))
_AFTER = {EITHER: (SHORT, ENDLESS), SHORT: (END,), ENDLESS: (ENDLESS,)}
_LOGIT = 40.0


def write_bigram_model(directory: Path, base: Path) -> Path:
    """The model in `base` with other weights: after `=` comes an `a`, which ends, or as often a `b`, and `b`s for ever.

    The layers add nothing to the embedding, which is one number for each token.
    """
    shutil.copytree(base, directory)
    weights = load_file(base / "model.safetensors")
    for name, tensor in weights.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
    size = len(weights["lm_head.weight"])
    weights["model.embed_tokens.weight"] = torch.eye(size)
    weights["model.norm.weight"] = torch.ones(size)
    table = torch.zeros(size, size)
    for last, following in _AFTER.items():
        table[list(following), last] = _LOGIT / size**0.5  # the norm makes the one sqrt(size)
    weights["lm_head.weight"] = table
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
