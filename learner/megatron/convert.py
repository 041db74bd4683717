"""Weights between Hugging Face names and Megatron's, both ways, bit for bit, on any division over ranks.

One table says it all: a Megatron parameter, or one expert's part of it, is made of one or several Hugging Face tensors,
joined in one of four ways.

    alone      the tensor itself
    qkv        for each query group: its query heads, its key head, its value head
    halves     one above the other (gate and up projection)
    stacked    side by side in a dimension of their own (gate and up projection of an expert)

Where ranks share a matrix, each of these tensors is cut in equal parts along one dimension, and a rank joins its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from common.errors import ModelError
from common.shape import ModelShape
from learner.megatron.model import HiddenStateModel
from learner.megatron.parallel import Place, Share
from learner.megatron.weights import WeightFiles

Split = Callable[[Tensor], list[Tensor]]
Join = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Conversion:
    """One row of the table.

    Attributes:
        megatron: The parameter's name.
        hugging_face: Names of the tensors that it is made of.
        split: Megatron's parameter as (this rank's parts of) Hugging Face's tensors.
        join: The reverse.
        dim: Along which those tensors are cut; None where every rank has them whole.
        expert: Which of this rank's experts it belongs to: its part of a weight that is stacked; None where to none.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    split: Split
    join: Join
    dim: int | None
    expert: int | None = None

    def part(self, place: Place) -> Share:
        """This rank's part of each tensor."""
        return place.tensor if self.expert is None else place.expert_tensor

    def of(self, parameter: Tensor) -> Tensor:
        """A view of what the row is about: a parameter, or one expert's part of it."""
        return parameter if self.expert is None else parameter[self.expert]


def import_weights(pieces: Sequence[HiddenStateModel], shape: ModelShape, place: Place, files: WeightFiles) -> None:
    """Sets every parameter of this rank.

    Raises:
        ModelError: A tensor is missing or has the wrong shape.
    """
    for piece in pieces:
        parameters = dict(piece.named_parameters())
        rows = list(conversions(piece, shape, place))
        if piece.post_process and shape.tie_word_embeddings and not piece.pre_process:
            rows.append(_alone("output_layer.weight", "model.embed_tokens.weight", dim=0))
        for row in rows:
            _import(row.of(parameters[row.megatron].detach()), row, row.part(place), files)
        rest = parameters.keys() - {row.megatron for row in rows}
        assert not rest, f"parameters without a row in the table: {sorted(rest)}"


def export_weights(
    pieces: Sequence[HiddenStateModel],
    shape: ModelShape,
    place: Place,
    value_of: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each Hugging Face weight that is this rank's to hand out: each is, on exactly one rank.

    All ranks must take all of theirs at the same time: those that share a matrix put it together, and take turns in
    handing it out, as replicas do, so that no rank has the whole model. Some tensors are views of the parameters, which
    the next update changes.

    Args:
        pieces: Of the model.
        shape: Of the model.
        place: This rank's.
        value_of: What to hand out for a parameter: itself, or something of its shape.
    """
    turn = 0
    for piece in pieces:
        parameters = dict(piece.named_parameters())
        for row in conversions(piece, shape, place):
            turn += 1
            replicas = place.replicas if row.expert is None else place.expert_replicas
            if turn % replicas.size != replicas.rank:
                continue
            share = row.part(place)
            is_ours = turn // replicas.size % share.size == share.rank
            tensors = row.split(row.of(value_of(parameters[row.megatron])))
            for name, part in zip(row.hugging_face, tensors, strict=True):
                whole = _whole(part, row, share)
                if is_ours:
                    yield name, whole
                del whole  # one is made at a time


def conversions(piece: HiddenStateModel, shape: ModelShape, place: Place) -> Iterator[Conversion]:
    """The table of a piece of the model, in the order of its layers."""
    if piece.pre_process:
        yield _alone("embedding.word_embeddings.weight", "model.embed_tokens.weight", dim=0)
    first = get_transformer_layer_offset(piece.config, piece.vp_stage)
    for layer in range(len(piece.decoder.layers)):
        yield from _layer(shape, place, f"decoder.layers.{layer}", f"model.layers.{first + layer}")
    if piece.post_process:
        yield _alone("decoder.final_layernorm.weight", "model.norm.weight")
        if not shape.tie_word_embeddings:
            yield _alone("output_layer.weight", "lm_head.weight", dim=0)


def _import(parameter: Tensor, row: Conversion, part: Share, files: WeightFiles) -> None:
    num_parts = 1 if row.dim is None else part.size
    tensors: list[Tensor] = []
    for name, expected in zip(row.hugging_face, row.split(parameter), strict=True):
        whole = list(expected.shape)
        if row.dim is not None:
            whole[row.dim] *= num_parts
        found = files.shape(name)
        if found != whole:
            raise ModelError(f"{files.directory}: {name}: found shape {found}, expected {whole}")
        tensors.append(files.read(name, row.dim or 0, part.rank if num_parts > 1 else 0, num_parts))
    parameter.copy_(row.join(tensors))


def _whole(part: Tensor, row: Conversion, share: Share) -> Tensor:
    """A tensor that several ranks share, put together."""
    if row.dim is None or share.size == 1:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(share.size)]
    dist.all_gather(parts, part.contiguous(), group=share.group)
    return torch.cat(parts, dim=row.dim)


def _layer(shape: ModelShape, place: Place, megatron: str, hugging_face: str) -> Iterator[Conversion]:
    attention, source = f"{megatron}.self_attention", f"{hugging_face}.self_attn"
    yield _alone(f"{megatron}.input_layernorm.weight", f"{hugging_face}.input_layernorm.weight")
    for kind in ("weight", "bias") if shape.has_qkv_bias else ("weight",):
        names = tuple(f"{source}.{part}_proj.{kind}" for part in "qkv")
        yield _qkv(f"{attention}.linear_qkv.{kind}", names, shape, place.tensor.size)
    if shape.has_qk_norm:
        yield _alone(f"{attention}.q_layernorm.weight", f"{source}.q_norm.weight")
        yield _alone(f"{attention}.k_layernorm.weight", f"{source}.k_norm.weight")
    yield _alone(f"{attention}.linear_proj.weight", f"{source}.o_proj.weight", dim=1)
    yield _alone(f"{megatron}.pre_mlp_layernorm.weight", f"{hugging_face}.post_attention_layernorm.weight")
    if not shape.is_moe:
        names = _gate_up(f"{hugging_face}.mlp")
        yield Conversion(f"{megatron}.mlp.linear_fc1.weight", names, _halves, torch.cat, 0)
        yield _alone(f"{megatron}.mlp.linear_fc2.weight", f"{hugging_face}.mlp.down_proj.weight", dim=1)
        return
    yield _alone(f"{megatron}.mlp.router.weight", f"{hugging_face}.mlp.gate.weight")
    num_own = shape.total_experts // place.expert.size
    for own in range(num_own):
        expert = f"{hugging_face}.mlp.experts.{place.expert.rank * num_own + own}"
        experts = f"{megatron}.mlp.experts"
        yield Conversion(f"{experts}.gate_up", _gate_up(expert), _unstacked, torch.stack, 0, own)
        yield _alone(f"{experts}.down", f"{expert}.down_proj.weight", dim=1, expert=own)


def _gate_up(module: str) -> tuple[str, str]:
    return f"{module}.gate_proj.weight", f"{module}.up_proj.weight"


def _alone(megatron: str, hugging_face: str, *, dim: int | None = None, expert: int | None = None) -> Conversion:
    return Conversion(megatron, (hugging_face,), lambda own: [own], lambda parts: parts[0], dim, expert)


def _halves(fused: Tensor) -> list[Tensor]:
    return list(fused.chunk(2))


def _unstacked(fused: Tensor) -> list[Tensor]:
    return list(fused.unbind())


def _qkv(megatron: str, names: tuple[str, ...], shape: ModelShape, num_ranks: int) -> Conversion:
    groups = shape.num_key_value_heads // num_ranks
    rows = [shape.num_attention_heads // shape.num_key_value_heads * shape.channels, shape.channels, shape.channels]
    split, join = partial(_split_qkv, groups=groups, rows=rows), partial(_join_qkv, groups=groups)
    return Conversion(megatron, names, split, join, 0)


def _split_qkv(fused: Tensor, *, groups: int, rows: list[int]) -> list[Tensor]:
    return [part.flatten(0, 1) for part in fused.unflatten(0, (groups, -1)).split(rows, dim=1)]


def _join_qkv(tensors: list[Tensor], *, groups: int) -> Tensor:
    return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)
