"""The code of one block: what changed between two runs of words, as streams of one kind of symbol each.

Positions are gaps: a byte below 255 ends a gap, each 255 before it is that many unchanged words more. Where many words
changed, they are a bitmap. Changes are differences of the words, which count units in the last place: zigzag, less one,
in four bits, two to a byte; 15 stands for more, and what is above it follows in planes of bytes. Each stream is
compressed by zstd, where that makes it smaller.
"""

import struct
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from common.errors import WeightsError
from common.weights.parts import Word, Words

_HEAD = struct.Struct("<BI")  # how positions are coded, number of changes
_STREAM = struct.Struct("<II")  # size in bytes, and as compressed; the same where it is not
_GAPS, _BITMAP = 0, 1
_BITMAP_SHARE = 1 / 8
_ESCAPE = 15
_COMPARED_WORDS = 1 << 16
_ZSTD = pa.Codec("zstd", compression_level=1)


class Changes(NamedTuple):
    """What changed in a run of words.

    Attributes:
        positions: Where, ascending.
        differences: The new word less the old one, modulo 2**16 (bfloat16) or 2**32 (float32); never 0.
    """

    positions: NDArray[np.int64]
    differences: Words


def find_changes(base: Words, new: Words) -> Changes:
    """What changed, by the bits."""
    pieces = [
        np.flatnonzero(base[at : at + _COMPARED_WORDS] != new[at : at + _COMPARED_WORDS]) + at
        for at in range(0, base.size, _COMPARED_WORDS)
    ]
    positions = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    return Changes(positions, new[positions] - base[positions])


def encode_block(changes: Changes, num_words: int) -> bytes:
    """The changes as bytes; none for none."""
    positions, differences = changes
    if not positions.size:
        return b""
    if positions.size < _BITMAP_SHARE * num_words:
        mode, streams = _GAPS, [_gap_bytes(positions)]
    else:
        mode, streams = _BITMAP, [_bitmap(positions, num_words)]
    streams += _difference_streams(differences)
    return b"".join([_HEAD.pack(mode, positions.size), *map(_packed, streams)])


def decode_block(data: memoryview, dtype: Word, num_words: int) -> Changes:
    """What `encode_block` made bytes of.

    Raises:
        WeightsError: The bytes are not of a block of this size.
    """
    if not data:
        return Changes(np.empty(0, np.int64), np.empty(0, dtype))
    try:
        mode, num_changed = _HEAD.unpack_from(data)
        streams = _unpacked(data[_HEAD.size :])
        positions = _read_gaps(streams[0]) if mode == _GAPS else np.flatnonzero(np.unpackbits(streams[0]))
        differences = _read_differences(streams[1:], dtype, num_changed)
    except (struct.error, OSError, IndexError, ValueError) as error:
        raise WeightsError(f"found a malformed block of {len(data)} bytes: {error}") from error
    if positions.size != num_changed or differences.size != num_changed or int(positions[-1]) >= num_words:
        raise WeightsError(f"found {positions.size} positions, expected {num_changed} below {num_words}")
    return Changes(positions, differences)


def _gap_bytes(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum(gaps // 255 + 1)
    coded = np.full(ends[-1], 255, np.uint8)
    coded[ends - 1] = gaps % 255
    return coded


def _read_gaps(coded: NDArray[np.uint8]) -> NDArray[np.int64]:
    ends = np.flatnonzero(coded != 255)
    return np.cumsum(coded, dtype=np.int64)[ends] + np.arange(ends.size)


def _bitmap(positions: NDArray[np.int64], num_words: int) -> NDArray[np.uint8]:
    changed = np.zeros(num_words, np.bool_)
    changed[positions] = True
    return np.packbits(changed)


def _difference_streams(differences: Words) -> list[NDArray[np.uint8]]:
    size = differences.itemsize
    signs = (differences.view(f"<i{size}") >> (8 * size - 1)).view(differences.dtype)
    codes = ((differences << 1) ^ signs) - 1
    nibbles = np.zeros(codes.size + codes.size % 2, np.uint8)
    np.minimum(codes, _ESCAPE, out=nibbles[: codes.size], casting="unsafe")
    rest = codes[codes >= _ESCAPE] - _ESCAPE
    planes = rest.view(np.uint8).reshape(-1, size)
    return [np.bitwise_or(nibbles[::2], nibbles[1::2] << 4, dtype=np.uint8), *(planes[:, i] for i in range(size))]


def _read_differences(streams: list[NDArray[np.uint8]], dtype: Word, num_changed: int) -> Words:
    packed, *planes = streams
    nibbles = np.empty((packed.size, 2), np.uint8)
    np.bitwise_and(packed, 15, out=nibbles[:, 0])
    np.right_shift(packed, 4, out=nibbles[:, 1])
    codes = nibbles.reshape(-1)[:num_changed].astype(dtype)
    rest = np.stack(planes, axis=1).reshape(-1).view(dtype)
    codes[codes == _ESCAPE] += rest
    codes += 1
    return (codes >> 1) ^ (-(codes & 1).astype(dtype))


def _packed(stream: NDArray[np.uint8]) -> bytes:
    raw = stream.tobytes()
    coded = _ZSTD.compress(raw, asbytes=True) if raw else raw
    coded = coded if len(coded) < len(raw) else raw
    return _STREAM.pack(len(raw), len(coded)) + coded


def _unpacked(data: memoryview) -> list[NDArray[np.uint8]]:
    streams: list[NDArray[np.uint8]] = []
    while data:
        size, coded_size = _STREAM.unpack_from(data)
        coded, data = data[_STREAM.size : _STREAM.size + coded_size], data[_STREAM.size + coded_size :]
        raw = coded if size == coded_size else _ZSTD.decompress(coded, size)
        streams.append(np.frombuffer(raw, np.uint8))
    return streams
