"""Streams of one kind of symbol each, as bytes that a general-purpose compressor codes near their entropy."""

import struct
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from common.weights.parts import Word, Words

Bytes = NDArray[np.uint8]
NIBBLE, BYTE = 15, 255
_RARE = 0.03
_SIZES = struct.Struct("<II")  # in bytes, and as compressed: the same where it is not
_ZSTD = pa.Codec("zstd", compression_level=1)


def symbols(codes: Words, escape: int) -> list[Bytes]:
    """Codes, most of them small, as streams: each in a byte, or, where `escape` is `NIBBLE`, two to a byte.

    Two are one of the first half and one of the second. The escape stands for itself and more; what is above it follows
    in planes.
    """
    more = codes >= escape
    rest = np.take(codes, indices(more))
    rest -= escape
    low = codes.astype(np.uint8)
    low |= np.negative(more.view(np.uint8))  # all bits where there is more
    low &= escape
    return [_nibbles(low) if escape == NIBBLE else low, *planes(rest)]


def read_symbols(streams: list[Bytes], escape: int, word: Word, num_codes: int) -> Words:
    """The codes that `symbols` made streams of.

    Raises:
        ValueError: There are not so many.
    """
    low, *above = streams
    codes = (_read_nibbles(low) if escape == NIBBLE else low)[:num_codes].astype(word)
    if codes.size != num_codes:
        raise ValueError(f"found {codes.size} codes, expected {num_codes}")
    rest = read_planes(above, word)
    escaped = indices(codes == escape)
    if rest.size != escaped.size:
        raise ValueError(f"found {rest.size} codes above {escape}, expected {escaped.size}")
    rest += escape
    codes[escaped] = rest
    return codes


def gaps(ascending: NDArray[np.int64]) -> NDArray[np.uint32]:
    """How many indices are left out before each of these."""
    between = np.empty(ascending.size, np.uint32)
    between[:1] = ascending[:1]
    np.subtract(ascending[1:], ascending[:-1], out=between[1:], casting="unsafe")
    between[1:] -= 1
    return between


def read_gaps(between: NDArray[np.uint32]) -> NDArray[np.int64]:
    """The indices between which these gaps are."""
    ascending = np.cumsum(between, dtype=np.int64)
    ascending += np.arange(between.size)
    return ascending


def indices(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where the mask holds.

    NumPy searches for each next one where at most a tenth are, and looks at all otherwise, which is faster from a
    fiftieth on: enough of them behind the mask make it do so.
    """
    num_true = np.count_nonzero(mask)
    if not _RARE * mask.size < num_true <= 0.1 * mask.size:
        return np.flatnonzero(mask)
    return np.flatnonzero(np.concatenate([mask, np.ones(mask.size // 8, np.bool_)]))[:num_true]


def zigzag(differences: Words) -> Words:
    """Differences modulo the words' range as codes that are small where they are near 0: 0, -1, 1, -2, 2 are 0 to 4."""
    size = differences.itemsize
    signs = differences.view(f"<i{size}") >> (8 * size - 1)
    codes = differences << 1
    codes ^= signs.view(differences.dtype)
    return codes


def read_zigzag(codes: Words) -> Words:
    """The differences that `zigzag` coded."""
    signs = codes & 1
    np.negative(signs, out=signs)
    signs ^= codes >> 1
    return signs


def planes(words: Words) -> list[Bytes]:
    """The lowest bytes of all words, the second lowest of all, and so on."""
    return [(words >> shift).astype(np.uint8) for shift in range(0, 8 * words.itemsize, 8)]


def read_planes(each: list[Bytes], word: Word) -> Words:
    """The words of which these are the planes."""
    words = each[0].astype(word)
    for number, plane in enumerate(each[1:], 1):
        higher = plane.astype(word)
        higher <<= 8 * number
        words |= higher
    return words


def pack(streams: Iterable[Bytes]) -> bytes:
    """All of them behind each other, each compressed where that makes it smaller."""
    packed: list[bytes] = []
    for stream in streams:
        raw = stream.data
        coded = _ZSTD.compress(raw, asbytes=True) if raw else b""
        coded = coded if len(coded) < len(raw) else stream.tobytes()
        packed += [_SIZES.pack(len(raw), len(coded)), coded]
    return b"".join(packed)


def unpack(data: memoryview) -> list[Bytes]:
    """The streams that `pack` packed.

    Raises:
        ValueError: The bytes are something else.
    """
    streams: list[Bytes] = []
    while data:
        if len(data) < _SIZES.size:
            raise ValueError(f"found {len(data)} bytes, expected a stream")
        size, coded_size = _SIZES.unpack_from(data)
        coded, data = data[_SIZES.size : _SIZES.size + coded_size], data[_SIZES.size + coded_size :]
        try:
            raw = coded if size == coded_size else _ZSTD.decompress(coded, size)
        except OSError as error:
            raise ValueError(f"found no zstd frame: {error}") from error
        streams.append(np.frombuffer(raw, np.uint8))
    return streams


def _nibbles(codes: Bytes) -> Bytes:
    packed, high = codes[: -(-codes.size // 2)].copy(), codes[-(-codes.size // 2) :]
    high = high << 4
    packed[: high.size] |= high.view(np.uint8)
    return packed


def _read_nibbles(packed: Bytes) -> Bytes:
    """The codes, and a 0 behind an odd number of them."""
    codes = np.empty(2 * packed.size, np.uint8)
    np.bitwise_and(packed, 15, out=codes[: packed.size])
    np.right_shift(packed, 4, out=codes[packed.size :])
    return codes
