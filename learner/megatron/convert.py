"""Weights between Hugging Face names and Megatron's, both ways, bit for bit.

One table says it all: a Megatron parameter is made of one or several Hugging Face tensors, joined in one of three ways.

    alone      the tensor itself
    qkv        for each query group: its query heads, its key head, its value head
    stacked    one above the other (gate and up projection)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from common.errors import ModelError
from common.shape import ModelShape
from learner.megatron.weights import WeightFiles

Split = Callable[[Tensor], list[Tensor]]
Join = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Conversion:
    """One row of the table.

    Attributes:
        megatron: The parameter's name.
        hugging_face: Names of the tensors that it is made of.
        split: Megatron's parameter as Hugging Face's tensors.
        join: The reverse.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    split: Split
    join: Join


def conversions(shape: ModelShape) -> Iterator[Conversion]:
    """The table of a model, in the order of its layers."""
    yield _alone("embedding.word_embeddings.weight", "model.embed_tokens.weight")
    for layer in range(shape.num_hidden_layers):
        yield from _layer(shape, f"decoder.layers.{layer}", f"model.layers.{layer}")
    yield _alone("decoder.final_layernorm.weight", "model.norm.weight")
    if not shape.tie_word_embeddings:
        yield _alone("output_layer.weight", "lm_head.weight")


def import_weights(model: torch.nn.Module, shape: ModelShape, files: WeightFiles) -> None:
    """Sets every parameter of the model.

    Raises:
        ModelError: A tensor is missing or has the wrong shape.
    """
    parameters = dict(model.named_parameters())
    for row in conversions(shape):
        parameter = parameters.pop(row.megatron)
        tensors = [files.read(name) for name in row.hugging_face]
        for name, tensor, expected in zip(row.hugging_face, tensors, row.split(parameter.detach()), strict=True):
            if tensor.shape != expected.shape:
                raise ModelError(
                    f"{files.directory}: {name}: found shape {list(tensor.shape)}, expected {list(expected.shape)}"
                )
        with torch.no_grad():
            parameter.copy_(row.join(tensors))
    assert not parameters, f"parameters without a row in the table: {sorted(parameters)}"


def export_weights(model: torch.nn.Module, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each Hugging Face weight; some are views of the parameters, which the next update changes."""
    parameters = dict(model.named_parameters())
    for row in conversions(shape):
        yield from zip(row.hugging_face, row.split(parameters[row.megatron].detach()), strict=True)


def _layer(shape: ModelShape, megatron: str, hugging_face: str) -> Iterator[Conversion]:
    attention, source = f"{megatron}.self_attention", f"{hugging_face}.self_attn"
    yield _alone(f"{megatron}.input_layernorm.weight", f"{hugging_face}.input_layernorm.weight")
    for kind in ("weight", "bias") if shape.has_qkv_bias else ("weight",):
        names = tuple(f"{source}.{part}_proj.{kind}" for part in "qkv")
        yield _qkv(f"{attention}.linear_qkv.{kind}", names, shape)
    if shape.has_qk_norm:
        yield _alone(f"{attention}.q_layernorm.weight", f"{source}.q_norm.weight")
        yield _alone(f"{attention}.k_layernorm.weight", f"{source}.k_norm.weight")
    yield _alone(f"{attention}.linear_proj.weight", f"{source}.o_proj.weight")
    yield _alone(f"{megatron}.pre_mlp_layernorm.weight", f"{hugging_face}.post_attention_layernorm.weight")
    if not shape.is_moe:
        yield from _gated(f"{megatron}.mlp", f"{hugging_face}.mlp")
        return
    yield _alone(f"{megatron}.mlp.router.weight", f"{hugging_face}.mlp.gate.weight")
    for expert in range(shape.total_experts):
        yield from _gated(f"{megatron}.mlp.experts.local_experts.{expert}", f"{hugging_face}.mlp.experts.{expert}")


def _gated(megatron: str, hugging_face: str) -> Iterator[Conversion]:
    names = (f"{hugging_face}.gate_proj.weight", f"{hugging_face}.up_proj.weight")
    yield Conversion(f"{megatron}.linear_fc1.weight", names, lambda fused: list(fused.chunk(2)), torch.cat)
    yield _alone(f"{megatron}.linear_fc2.weight", f"{hugging_face}.down_proj.weight")


def _alone(megatron: str, hugging_face: str) -> Conversion:
    return Conversion(megatron, (hugging_face,), lambda tensor: [tensor], lambda tensors: tensors[0])


def _qkv(megatron: str, names: tuple[str, ...], shape: ModelShape) -> Conversion:
    groups, heads = shape.num_key_value_heads, shape.num_attention_heads
    rows = [heads // groups * shape.channels, shape.channels, shape.channels]
    return Conversion(megatron, names, partial(_split_qkv, groups=groups, rows=rows), partial(_join_qkv, groups=groups))


def _split_qkv(fused: Tensor, *, groups: int, rows: list[int]) -> list[Tensor]:
    return [part.flatten(0, 1) for part in fused.unflatten(0, (groups, -1)).split(rows, dim=1)]


def _join_qkv(tensors: list[Tensor], *, groups: int) -> Tensor:
    return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)
