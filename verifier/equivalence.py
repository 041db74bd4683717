"""Whether two answers are equal: the same text in one spelling, the same number exactly, or lists of such.

There is no tolerance. A decimal equals a fraction that it cannot write out only as its rounding to at least
`MIN_ROUNDED` significant digits. What this does not do: algebra. `x+1` is not `1+x` here, which costs a right answer
its reward and never gives a wrong one any.
"""

import re
from typing import Final

from verifier.notation import canonical
from verifier.numerals import Numeral, numeral

MAX_CHARACTERS: Final = 1_000
MAX_DEPTH: Final = 16
MAX_UNORDERED: Final = 64
MIN_ROUNDED: Final = 6

_NAMED = re.compile(r"([a-zA-Z](?:_\w|_\{\w+\})?(?:\([a-z]\))?|\\[a-z]+)=([^=]+)")
_OPEN, _CLOSE = "([{", ")]}"


def equivalent(found: str, expected: str) -> bool:
    """Whether the answer that was found is the expected one."""
    if found.strip() == expected.strip():
        return bool(found.strip())
    if len(found) > MAX_CHARACTERS or len(expected) > MAX_CHARACTERS:
        return False
    left, right = canonical(found), canonical(expected)
    return bool(left) and bool(right) and _equal(_last_of_chain(left), _last_of_chain(right))


def _equal(left: str, right: str) -> bool:
    """Whether two canonical texts are equal. A name is compared where both have one: `x=3` is 3 but not `y=3`."""
    if left == right:
        return True
    left_name, left_value = _split_name(left)
    right_name, right_value = _split_name(right)
    if left_name and right_name and left_name != right_name:
        return False
    if left_value == right_value:
        return True
    first, second = numeral(left_value), numeral(right_value)
    if first and second:
        return _same_number(first, second)
    return not (first or second) and _same_list(left_value, right_value)


def _same_number(first: Numeral, second: Numeral) -> bool:
    if first.is_percent != second.is_percent:
        return False
    return first.value == second.value or _is_rounding(first, second) or _is_rounding(second, first)


def _is_rounding(short: Numeral, full: Numeral) -> bool:
    """Whether `short` is `full`, whose decimals never end, rounded or cut off after enough significant digits."""
    if short.num_decimals is None or _ends(full.value.denominator):
        return False
    unit = 10**short.num_decimals
    if abs(short.value) * unit < 10 ** (MIN_ROUNDED - 1):
        return False
    scaled = abs(full.value) * unit
    same_sign = (short.value > 0) == (full.value > 0)
    return same_sign and abs(short.value) * unit in (round(scaled), int(scaled))


def _ends(denominator: int) -> bool:
    """Whether a fraction in lowest terms has finitely many decimals."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _same_list(left: str, right: str) -> bool:
    """Brackets and order count; a bare list, or a set, has no order."""
    left_kind, left_items = _items(left)
    right_kind, right_items = _items(right)
    if left_kind != right_kind or len(left_items) != len(right_items) or left_items == [left]:
        return False
    if left_kind in ("", r"\{\}") and len(left_items) <= MAX_UNORDERED:
        return _same_in_any_order(left_items, right_items)
    return all(map(_equal, left_items, right_items))


def _same_in_any_order(left: list[str], right: list[str]) -> bool:
    remaining = list(right)
    for item in left:
        match = next((other for other in remaining if _equal(item, other)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _items(text: str) -> tuple[str, list[str]]:
    """The brackets around a list, if they enclose all of it, and its items."""
    for opening, closing in ((r"\{", r"\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            parts = _split(inner)
            if parts is not None:
                return opening + closing, parts
    return "", _split(text) or [text]


def _split(text: str) -> list[str] | None:
    """Text at its outermost commas; None where its brackets do not balance, or are too deep to look at."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if not 0 <= depth <= MAX_DEPTH:
            return None
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]] if depth == 0 else None


def _split_name(text: str) -> tuple[str, str]:
    match = _NAMED.fullmatch(text)
    return (match[1], match[2]) if match else ("", text)


def _last_of_chain(text: str) -> str:
    """The end of `a+b = 12+50 = 62`; a single equation stays one."""
    parts = re.split(r"(?<![<>!])=", text)
    return parts[-1] if len(parts) > 2 and _split(text) == [text] else text
