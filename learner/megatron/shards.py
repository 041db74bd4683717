"""The optimizer's state under Hugging Face's names, in parts: the same names and sizes on every division over ranks.

`weight.NAME` is a weight in float32, `exp_avg.NAME` and `exp_avg_sq.NAME` are its moments.

Each replica has a range of every parameter, laid out flat. A conversion moves whole rows, so a range is at most three
boxes for each run of rows: the end of a row, whole rows, the beginning of a row.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.shape import ModelShape
from learner.megatron.convert import Conversion, conversions
from learner.megatron.model import HiddenStateModel
from learner.megatron.optimizer import Optimizer, Owned
from learner.megatron.parallel import Place
from learner.sharded import Part, Sharded


class _Run(NamedTuple):
    """Rows of a parameter that follow each other in one of Hugging Face's tensors, too.

    Attributes:
        name: Of the tensor.
        size: Of the whole tensor, on all ranks.
        first: Row of the parameter.
        num: Rows.
        offsets: Of the first row in the whole tensor: its number, and its first column where it has columns.
    """

    name: str
    size: tuple[int, ...]
    first: int
    num: int
    offsets: tuple[int, ...]


def optimizer_shards(
    pieces: Sequence[HiddenStateModel], optimizer: Optimizer, shape: ModelShape, place: Place, *, copy: bool
) -> dict[str, Sharded]:
    """The float32 weights and both moments that this rank has.

    Args:
        pieces: Of the model.
        optimizer: Of the model.
        shape: Of the model.
        place: This rank's.
        copy: Whether in copies, in host memory, without what another rank has as well. Else the parts are the
            optimizer's own memory.
    """
    shards: dict[str, Sharded] = {}
    for piece in pieces:
        parameters = dict(piece.named_parameters())
        owned: dict[str, Owned | None] = {}
        for row in _rows(piece, parameters, shape, place):
            is_copy = row.dim is None and row.part(place).rank != 0
            tied = row.megatron == _OUTPUT and shape.tie_word_embeddings
            if copy and (is_copy or tied):
                continue
            if row.megatron not in owned:
                owned[row.megatron] = optimizer.owned(parameters[row.megatron], copy=copy)
            if (own := owned[row.megatron]) is not None:
                shards |= _of_row(parameters[row.megatron], row, own, place)
    return shards


_OUTPUT = "output_layer.weight"


def _rows(
    piece: HiddenStateModel, parameters: dict[str, torch.nn.Parameter], shape: ModelShape, place: Place
) -> Iterator[Conversion]:
    """The table of conversions, with the copy of a tied embedding that the last of several stages has."""
    yield from conversions(piece, shape, place)
    if shape.tie_word_embeddings and _OUTPUT in parameters:
        names = ("model.embed_tokens.weight",)
        yield Conversion(_OUTPUT, names, lambda own: [own], lambda parts: parts[0], 0)


def _of_row(parameter: Tensor, row: Conversion, own: Owned, place: Place) -> dict[str, Sharded]:
    """This rank's range of a parameter, as parts of the tensors that a row of the table is about."""
    width = parameter.shape[-1] if parameter.dim() > 1 else 1
    runs = _runs(parameter, row, place)
    sizes = {run.name: run.size for run in runs}
    shards: dict[str, Sharded] = {}
    for kind, flat in own.tensors.items():
        parts: dict[str, list[Part]] = {}
        for run in runs:
            parts.setdefault(run.name, []).extend(_boxes(run, flat, own.start, width))
        shards |= {kind + name: Sharded(sizes[name], found) for name, found in parts.items() if found}
    return shards


def _runs(parameter: Tensor, row: Conversion, place: Place) -> list[_Run]:
    """Where each row of a parameter is in Hugging Face's tensors."""
    is_matrix = parameter.dim() > 1
    leading = parameter.shape[:-1] if is_matrix else parameter.shape
    numbers = torch.arange(math.prod(leading)).view(*leading, 1) if is_matrix else torch.arange(len(parameter))
    columns = tuple(parameter.shape[-1:]) if is_matrix else ()
    share = row.part(place)
    runs: list[_Run] = []
    both = row.split(row.of(numbers)), row.split(row.of(parameter.detach()))
    for name, part, whole in zip(row.hugging_face, *both, strict=True):
        rows = part.flatten().numpy()
        local = (len(rows), *columns)
        assert whole.shape == local, f"{row.megatron}: a conversion that does not move whole rows"
        size, start = list(local), [0] * len(local)
        if row.dim is not None:
            size[row.dim] *= share.size
            start[row.dim] = share.rank * local[row.dim]
        edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for a, b in pairwise(edges):
            runs.append(_Run(name, tuple(size), int(rows[a]), b - a, (start[0] + a, *start[1:])))
    return runs


def _boxes(run: _Run, flat: Tensor, start: int, width: int) -> list[Part]:
    """What a run of rows of `width` has of the range of a parameter that begins at `start`."""
    begin = max(start, run.first * width)
    end = min(start + flat.numel(), (run.first + run.num) * width)
    parts: list[Part] = []
    while begin < end:
        row, column = divmod(begin, width)
        num = (end - begin) // width if column == 0 else 0
        stop = begin + num * width if num else min(end, (row + 1) * width)
        data = flat[begin - start : stop - start]
        where = run.offsets[0] + row - run.first
        if len(run.offsets) == 1:
            parts.append(Part((where,), data))
        else:
            parts.append(Part((where, run.offsets[1] + column), data.view(max(num, 1), -1)))
        begin = stop
    return parts
