"""Tiny checkpoints with random weights, in Hugging Face format: what a user's model directory looks like."""

import json
from pathlib import Path
from typing import Any, Literal

Architecture = Literal["qwen2", "qwen3", "qwen3_moe"]
VOCABULARY = ["<pad>", "<eos>", *"0123456789", "+", "-", "*", "=", " ", *"abcdefghijklmnopqrstuvwxyz", "\n", ":", "."]


def write_tiny_model(directory: Path, architecture: Architecture, *, seed: int = 0, **changes: Any) -> Path:
    """Writes weights, config and a character tokenizer; `changes` are fields of the transformers config."""
    import torch

    from common.vision import declare_vision_operators

    declare_vision_operators()
    import transformers

    names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
    name = names[architecture]
    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    if architecture == "qwen3_moe":
        shape |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**(shape | changes))
    getattr(transformers, f"{name}ForCausalLM")(config).float().save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
