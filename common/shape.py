"""What a Hugging Face `config.json` says of a model, for the architectures that are supported."""

from pathlib import Path
from typing import Any

import msgspec

from common.architectures import QWEN2, QWEN3_MOE, check_architecture
from common.errors import ConfigError, ModelError
from common.learning import LearnerConfig, ParallelConfig
from common.sections import EngineParallelConfig


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `config.json` that matter here, under their own names and with transformers' defaults."""

    architectures: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    use_sliding_window: bool = False
    max_position_embeddings: int = 32_768
    rope_theta: float = 10_000.0
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    num_experts: int = 0
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @property
    def architecture(self) -> str:
        """The class that transformers would build."""
        return self.architectures[0]

    @property
    def is_moe(self) -> bool:
        """Whether the layers have experts."""
        return self.architecture == QWEN3_MOE

    @property
    def total_experts(self) -> int:
        """Experts of a layer: `num_local_experts` since transformers 5, before that `num_experts`."""
        return self.num_local_experts or self.num_experts

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the attention projections have a bias."""
        return self.architecture == QWEN2

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalized."""
        return not self.has_qkv_bias

    @property
    def channels(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_base(self) -> float:
        """Base of the rotary frequencies: in `rope_parameters` since transformers 5, before that beside it."""
        return float((self.rope_parameters or {}).get("rope_theta", self.rope_theta))

    @property
    def rope_type(self) -> str:
        """How the rotary frequencies are scaled."""
        scaling = self.rope_parameters or self.rope_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))


def read_shape(model_dir: Path) -> ModelShape:
    """The shape of the model in a directory.

    Raises:
        ModelError: The directory or its config is missing or broken, or the model is not supported.
    """
    check_architecture(model_dir)
    path = model_dir / "config.json"
    try:
        shape = msgspec.json.decode(path.read_bytes(), type=ModelShape)
    except msgspec.DecodeError as error:
        raise ModelError(f"{path}: found no valid config: {error}") from error
    for wrong, message in _unsupported(shape):
        if wrong:
            raise ModelError(f"{path}: {message}")
    return shape


def check_division(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Checks that the model can be divided over the learner's ranks.

    Raises:
        ConfigError: A size is no multiple of the ranks that share it, or there is nothing to share.
    """
    stages = parallel.pipeline * parallel.virtual_pipeline
    tensor = "learner.parallel.tensor"
    rows = [
        ("num_attention_heads", shape.num_attention_heads, tensor, parallel.tensor),
        ("num_key_value_heads", shape.num_key_value_heads, tensor, parallel.tensor),
        ("vocab_size", shape.vocab_size, tensor, parallel.tensor),
        ("num_hidden_layers", shape.num_hidden_layers, "learner.parallel.pipeline * virtual_pipeline", stages),
    ]
    if shape.is_moe:
        rows.append(("num_experts", shape.total_experts, "learner.parallel.expert", parallel.expert))
        size = shape.moe_intermediate_size
        rows.append(("moe_intermediate_size", size, "learner.parallel.expert_tensor", parallel.expert_tensor))
    else:
        rows.append(("intermediate_size", shape.intermediate_size, tensor, parallel.tensor))
    for name, size, key, ranks in rows:
        if size % ranks:
            raise ConfigError(f"{key}: found {ranks}, expected a divisor of the model's {name} = {size}")
    for key, ranks in (("expert", parallel.expert), ("expert_tensor", parallel.expert_tensor)):
        if ranks > 1 and not shape.is_moe:
            raise ConfigError(f"learner.parallel.{key}: found {ranks}, expected 1: the model has no experts")
    if shape.is_moe and parallel.expert == 1 and parallel.expert_tensor != parallel.tensor:
        raise ConfigError(
            f"learner.parallel.expert_tensor: found {parallel.expert_tensor} with expert = 1, expected {tensor} = "
            f"{parallel.tensor}: Megatron sums the gradients of experts that all ranks have over replicas alone"
        )
    if shape.is_moe and parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            f"learner.parallel.sequence: found false with {tensor} = {parallel.tensor}, expected true: the model has "
            "experts, and each token must reach them once"
        )


def check_experts(shape: ModelShape, learner: LearnerConfig) -> None:
    """Checks that grouped matrix products can take the experts: they want rows of whole 16 bytes.

    Raises:
        ConfigError: A row of an expert's weights is no multiple of that.
    """
    if not shape.is_moe:
        return
    multiple = 16 // (2 if learner.dtype == "bfloat16" else 4)
    parts = learner.parallel.expert_tensor
    for name, size in (
        ("hidden_size", shape.hidden_size),
        ("moe_intermediate_size / learner.parallel.expert_tensor", shape.moe_intermediate_size // parts),
    ):
        if size % multiple:
            raise ConfigError(
                f"learner.dtype: found {learner.dtype} with a model whose {name} = {size}, expected a multiple of "
                f"{multiple} there: grouped matrix products take rows of whole 16 bytes"
            )


def check_engine(shape: ModelShape, parallel: EngineParallelConfig) -> None:
    """Checks that the model can be divided over the GPUs of an engine.

    SGLang copies key and value heads where there are fewer than ranks, which the learner does not.

    Raises:
        ConfigError: A size is no multiple of the GPUs that share it, or there is nothing to share.
    """
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    inner = parallel.num_gpus // parallel.expert
    key = "generator.parallel"
    rows = [("tensor", heads, parallel.tensor, "num_attention_heads")]
    if groups % parallel.tensor and parallel.tensor % groups:
        rows.append(("tensor", groups, parallel.tensor, "num_key_value_heads"))
    if shape.is_moe:
        rows.append(("expert", shape.total_experts, parallel.expert, "num_experts"))
        rows.append(("tensor * data / expert", shape.moe_intermediate_size, inner, "moe_intermediate_size"))
    else:
        rows.append(("tensor", shape.intermediate_size, parallel.tensor, "intermediate_size"))
    for name, size, gpus, whole in rows:
        if size % gpus:
            raise ConfigError(f"{key}.{name}: found {gpus}, expected a divisor of the model's {whole} = {size}")
    for name, gpus in (("data", parallel.data), ("expert", parallel.expert)):
        if gpus > 1 and not shape.is_moe:
            raise ConfigError(
                f"{key}.{name}: found {gpus}, expected 1: the model has no experts; more engines are generator.count"
            )


def _unsupported(shape: ModelShape) -> list[tuple[bool, str]]:
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    sizes = (shape.vocab_size, shape.hidden_size, shape.num_hidden_layers, heads, groups, shape.intermediate_size)
    experts, chosen = shape.total_experts, shape.num_experts_per_tok
    return [
        (min(sizes) < 1, f"found sizes {sizes}, expected all of them positive"),
        (
            heads % max(groups, 1) != 0,
            f"num_attention_heads: found {heads}, expected a multiple of num_key_value_heads = {groups}",
        ),
        (shape.hidden_act != "silu", f"hidden_act: found {shape.hidden_act!r}, expected 'silu'"),
        (
            shape.rope_type != "default",
            f"rope_parameters: found rope_type {shape.rope_type!r}, expected 'default'",
        ),
        (
            shape.use_sliding_window,
            "use_sliding_window: found true, expected false: attention sees the whole sequence here",
        ),
        (
            shape.attention_bias,
            "attention_bias: found true, expected false",
        ),
        (
            shape.is_moe and not 1 <= chosen <= experts,
            f"num_experts_per_tok: found {chosen}, expected 1 to num_experts = {experts}",
        ),
        (
            shape.is_moe and shape.moe_intermediate_size < 1,
            f"moe_intermediate_size: found {shape.moe_intermediate_size}, expected a positive number",
        ),
        (
            shape.is_moe and (shape.decoder_sparse_step != 1 or bool(shape.mlp_only_layers)),
            "decoder_sparse_step and mlp_only_layers: found layers without experts, expected experts in every layer",
        ),
    ]
