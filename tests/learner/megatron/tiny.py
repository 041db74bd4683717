"""Tiny Hugging Face models with random weights, and micro-batches for them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

import learner.megatron  # noqa: F401  # mends torchvision for transformers where there is no CUDA
from common.config import Config
from learner.batch import MicroBatch, Sequence, pack

VOCAB = 61
KINDS = ("qwen2", "qwen2-tied", "qwen3", "qwen3-tied", "qwen3-moe", "qwen3-moe-unnormalized")


def build(path: Path, kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Saves a model of a kind with its tokenizer; norms and biases are random, too."""
    hf = reference_class(kind)
    torch.manual_seed(seed)
    model = hf(hf.config_class(**options(kind) | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(path)
    write_tokenizer(path)
    return path


def reference_class(kind: str) -> Any:
    import transformers

    name = "Qwen3Moe" if "moe" in kind else kind.partition("-")[0].capitalize()
    return getattr(transformers, f"{name}ForCausalLM")


def options(kind: str) -> dict[str, Any]:
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": "tied" in kind,
    }
    if kind.startswith("qwen3"):
        common["head_dim"] = 16
    if "moe" in kind:
        common |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        common |= {"norm_topk_prob": "unnormalized" not in kind, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return common


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = {"<eos>": 0} | {chr(64 + i): i for i in range(1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(path / "tokenizer.json"))


def config(path: Path, **changes: Any) -> Config:
    """A run's config with this model; `changes` are sections or keys, by name."""
    sections: dict[str, Any] = {
        "model": str(path),
        "data": {"train": "unused.jsonl"},
        "optimizer": {"lr": 1e-3},
        "sampling": {"temperature": 0.8},
    }
    return msgspec.convert(sections | changes, Config)


def micro_batches(lengths: list[int], *, seed: int = 0, max_tokens: int = 4096) -> list[MicroBatch]:
    """Random sequences of these lengths, packed."""
    numbers = np.random.default_rng(seed)
    sequences = [
        Sequence(
            prompt=numbers.integers(0, VOCAB, max(1, n // 3), dtype=np.int32),
            response=numbers.integers(0, VOCAB, n - max(1, n // 3), dtype=np.int32),
            generator_logprobs=-numbers.random(n - max(1, n // 3), dtype=np.float32),
            advantage=float(numbers.normal()),
            staleness=0,
        )
        for n in lengths
    ]
    return pack(sequences, max_tokens)


def sequences_of(micro: MicroBatch) -> list[torch.Tensor]:
    """The token ids of each sequence."""
    starts = micro.sequence_starts.tolist()
    return [micro.token_ids[a:b] for a, b in pairwise(starts)]


def reference_logprobs(model: Any, micro: MicroBatch, temperature: float) -> torch.Tensor:
    """What transformers says, one sequence at a time; 0 for first tokens."""
    rows = []
    for tokens in sequences_of(micro):
        logits = model(tokens[None]).logits[0, :-1].float() / temperature
        chosen = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]
        rows.append(torch.cat([torch.zeros(1), chosen]))
    return torch.cat(rows)


def masked_mean_loss(micro: MicroBatch, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """A loss with the advantages' signs: the sum over sequences of A times the mean logprob of the response."""
    del entropy
    num = len(micro.advantages)
    mask = micro.response_mask
    sums = torch.zeros(num).index_add(0, micro.sequence_of_token[mask], logprobs[mask])
    counts = torch.zeros(num).index_add(0, micro.sequence_of_token[mask], torch.ones(int(mask.sum())))
    return -(micro.advantages * sums / counts).sum()


def gradients(policy: Any) -> dict[str, torch.Tensor]:
    """The gradients that the last update summed, those that this rank hands out, under Hugging Face names."""
    from learner.megatron.convert import export_weights

    for wrapped in policy._wrapped:
        for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
            _gather_replicas(buffer)
    return {
        name: tensor.clone()
        for name, tensor in export_weights(policy._pieces, policy._shape, policy._place, lambda p: p.main_grad)
    }


def of_saved(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The one of a saved tensor; transformers keeps the experts of a layer in one."""
    if ".experts." not in name:
        return tensors[name]
    layer, rest = name.split(".experts.")
    expert, projection, _ = rest.split(".")
    if projection == "down_proj":
        return tensors[f"{layer}.experts.down_proj"][int(expert)]
    gate, up = tensors[f"{layer}.experts.gate_up_proj"][int(expert)].chunk(2)
    return gate if projection == "gate_proj" else up


def _gather_replicas(buffer: Any) -> None:
    """The distributed optimizer leaves each replica its part of the sums."""
    import torch.distributed as dist

    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
        parts = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(parts, own, group=group)
        bucket.grad_data.copy_(torch.cat(parts))
