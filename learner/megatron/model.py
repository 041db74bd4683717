"""Megatron's GPTModel, built from a Hugging Face directory: this rank's part of it."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from common.learning import LearnerConfig, ParallelConfig
from common.shape import ModelShape
from learner.megatron import kernels
from learner.megatron.experts import GroupedExperts
from learner.megatron.kernels import Kernels
from learner.megatron.recompute import recompute_options


class HiddenStateModel(GPTModel):
    """A GPTModel that ends at its last hidden states: whole logits are never made (`learner.megatron.logprobs`).

    With pipeline parallelism it is one piece of the layers.
    """

    @property
    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the output layer, Float[vocab / tensor, hidden]; the embedding's where they are tied."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        assert weight is not None
        return weight

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """What `forward` returns: Float[tokens, 1, hidden], on the last stage all of this context rank's tokens."""
        if not self.post_process or self.config.tensor_model_parallel_size == 1:
            return hidden_states
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_states)
        return copy_to_tensor_model_parallel_region(hidden_states)


def build_model(
    shape: ModelShape, learner: LearnerConfig, dtype: torch.dtype, device: torch.device, chosen: Kernels
) -> list[HiddenStateModel]:
    """This rank's pieces of the model, in the order of their layers; their weights are not set yet."""
    config = transformer_config(shape, learner, dtype, chosen)
    num_pieces = learner.parallel.virtual_pipeline
    return [
        _build_piece(shape, config, chosen, piece if num_pieces > 1 else None).to(device=device, dtype=dtype)
        for piece in range(num_pieces)
    ]


def _build_piece(shape: ModelShape, config: TransformerConfig, chosen: Kernels, piece: int | None) -> HiddenStateModel:
    layers = get_num_layers_to_build(config, vp_stage=piece)
    block: Any = TransformerBlockSubmodules
    return HiddenStateModel(
        config=config,
        transformer_layer_spec=block(layer_specs=[layer_spec(shape, chosen)] * layers, layer_norm=kernels.norm(chosen)),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=piece),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=piece),
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,  # type: ignore[arg-type]  # annotated int, used as a number
        vp_stage=piece,
    )


def transformer_config(
    shape: ModelShape, learner: LearnerConfig, dtype: torch.dtype, chosen: Kernels
) -> TransformerConfig:
    """Megatron's config of the model: no dropout, and the fused kernels that were chosen."""
    return TransformerConfig(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.channels,
        qk_layernorm=shape.has_qk_norm,
        add_qkv_bias=shape.has_qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,  # the framework averages nothing: the loss is divided before it comes here
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=True,  # else Megatron does not mark the tensors that ranks share, and the norm is wrong
        deterministic_mode=torch.cuda.is_available(),
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **kernels.options(chosen),
        **_parallel_options(learner.parallel, dtype),
        **recompute_options(learner.recompute, shape),
        **(_expert_options(shape) if shape.is_moe else {}),
    )


def _parallel_options(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The division; micro-batches differ in length, and pieces of a pipeline must not send in batches."""
    interleaved = parallel.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "pipeline_dtype": dtype,
        "variable_seq_lengths": True,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "moe_token_dispatcher_type": "alltoall",
    }


def _expert_options(shape: ModelShape) -> dict[str, Any]:
    """Dropless experts, routed in float32 without auxiliary loss or jitter."""
    return {
        "num_moe_experts": shape.total_experts,
        "moe_ffn_hidden_size": shape.moe_intermediate_size,
        "moe_router_topk": shape.num_experts_per_tok,
        "moe_router_pre_softmax": not shape.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
    }


def layer_spec(shape: ModelShape, chosen: Kernels) -> ModuleSpec:
    """Megatron's local layer with the experts, the core attention and the norms that are ours to choose."""
    norm = kernels.norm(chosen)
    spec = get_gpt_layer_local_spec(
        num_experts=shape.total_experts if shape.is_moe else None,
        qk_layernorm=shape.has_qk_norm,
        normalization="RMSNorm",
    )
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    if shape.is_moe:
        layer.mlp.submodules.experts = GroupedExperts
    attention = layer.self_attention.submodules
    attention.core_attention = kernels.core_attention(chosen)
    if shape.has_qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    return spec
