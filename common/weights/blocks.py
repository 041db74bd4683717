"""What changed in one run of words, and its bytes.

Runs are compared by rows of 64 bits; one without a change is not looked at again. The bytes say which rows have one
(the gaps between them, in eight bits or in four; or all of them), which of their words changed (a bit each), and by
how much. That is the difference of the words, which counts units in the last place: zigzag, less one, in four bits,
where 15 stands for more, and what is above it follows in planes of bytes. float32 of which nearly every word changes
has the planes alone. So each stream has symbols of one kind, of three bits or so at least to a byte: below that zstd
spends time and bytes on chance repetitions.
"""

import struct
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from common.weights.parts import Word, Words
from common.weights.streams import (
    BYTE,
    NIBBLE,
    Bytes,
    gaps,
    indices,
    pack,
    planes,
    read_gaps,
    read_planes,
    read_symbols,
    read_zigzag,
    symbols,
    unpack,
    zigzag,
)

ROW_BYTES = 8
_HEAD = struct.Struct("<BI")  # the escape of the gaps, or one of the next two; number of gaps
_ALL_ROWS, _PLANES = 0, 1
_GAPS = np.dtype("<u4")
_GAP_STREAMS = 1 + _GAPS.itemsize
_NIBBLES_FROM = 1 / 4  # share of the rows
_ALL_FROM = 1 / 2
_PLANES_FROM = 3 / 4


class Block(NamedTuple):
    """What changed in a run of words, by rows of 64 bits.

    Attributes:
        num_words: Length of the run; the last row may stand for fewer words than the others.
        rows: Which ones have a change, ascending; all, where it is None.
        differences: New less old of each word in these rows, modulo the words' range.
    """

    num_words: int
    rows: NDArray[np.int64] | None
    differences: Words

    @classmethod
    def between(cls, base: Words, new: Words) -> Self:
        """What makes `new` of `base`, by the bits."""
        old_rows, new_rows = _rows(base), _rows(new)
        differ = old_rows != new_rows
        if np.count_nonzero(differ) > _ALL_FROM * differ.size:
            return cls(base.size, None, new - base)
        rows = indices(differ)
        return cls(base.size, rows, np.take(new_rows, rows).view(base.dtype) - np.take(old_rows, rows).view(base.dtype))

    def add_to(self, words: Words) -> None:
        """Makes the new words of the old ones, in place."""
        if self.rows is None:
            words += self.differences
            return
        held = _rows(words)
        patched = np.take(held, self.rows)
        each = patched.view(words.dtype)
        each += self.differences
        held[self.rows] = patched
        if not np.may_share_memory(held, words):
            words[:] = held.view(words.dtype)[: words.size]

    def num_changed(self) -> int:
        """How many words changed."""
        return int(np.count_nonzero(self.differences))

    def encode(self) -> bytes:
        """The block as bytes; none where nothing changed."""
        if self.rows is not None and not self.rows.size:
            return b""
        changed = self.differences != 0
        if self.rows is None and _mostly_floats(self.differences):
            return _HEAD.pack(_PLANES, 0) + pack(planes(zigzag(self.differences)))
        codes = zigzag(np.take(self.differences, indices(changed)))
        codes -= 1
        streams = [np.packbits(changed), *symbols(codes, NIBBLE)]
        if self.rows is None:
            return _HEAD.pack(_ALL_ROWS, 0) + pack(streams)
        escape = NIBBLE if self.rows.size * ROW_BYTES > _NIBBLES_FROM * self.num_words * codes.itemsize else BYTE
        return _HEAD.pack(escape, self.rows.size) + pack([*symbols(gaps(self.rows), escape), *streams])

    @classmethod
    def decode(cls, data: memoryview, word: Word, num_words: int) -> Self:
        """The block that `encode` made bytes of.

        Raises:
            ValueError: The bytes are not of a block of this size.
        """
        if not data:
            return cls(num_words, np.empty(0, np.int64), np.empty(0, word))
        if len(data) < _HEAD.size:
            raise ValueError(f"found {len(data)} bytes, expected a block")
        mode, num_rows = _HEAD.unpack_from(data)
        streams = unpack(data[_HEAD.size :])
        if mode == _PLANES:
            return cls(num_words, None, read_zigzag(_of_size(num_words, read_planes(streams, word))))
        if mode == _ALL_ROWS:
            return cls(num_words, None, _read_differences(streams, word, num_words))
        coded, streams = streams[:_GAP_STREAMS], streams[_GAP_STREAMS:]
        rows, row_words = read_gaps(read_symbols(coded, mode, _GAPS, num_rows)), ROW_BYTES // word.itemsize
        if not rows.size or rows[-1] * row_words >= num_words:
            raise ValueError(f"found changes in {rows.size} rows, expected some, within {num_words} words")
        return cls(num_words, rows, _read_differences(streams, word, num_rows * row_words))


def _mostly_floats(differences: Words) -> bool:
    """Whether these are float32 of which most changed: their differences are spread too far for few bits each."""
    return differences.itemsize == 4 and int(np.count_nonzero(differences)) > _PLANES_FROM * differences.size


def _rows(words: Words) -> NDArray[np.uint64]:
    """The words as rows: a view of them, or a copy with zeros behind them where they make no whole or aligned rows."""
    if words.nbytes % ROW_BYTES == 0 and (rows := words.view(np.uint64)).flags.aligned:
        return rows
    copy = np.zeros(-(-words.nbytes // ROW_BYTES), np.uint64)
    copy.view(words.dtype)[: words.size] = words
    return copy


def _read_differences(streams: list[Bytes], word: Word, num_words: int) -> Words:
    bits, *coded = streams
    inside = indices(np.unpackbits(bits, count=num_words).view(np.bool_))
    codes = read_symbols(coded, NIBBLE, word, inside.size)
    codes += 1
    differences = np.zeros(num_words, word)
    differences[inside] = read_zigzag(codes)
    return differences


def _of_size(num_words: int, words: Words) -> Words:
    """The words, as many as they have to be.

    Raises:
        ValueError: They are not.
    """
    if words.size != num_words:
        raise ValueError(f"found {words.size} words, expected {num_words}")
    return words
