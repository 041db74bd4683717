r"""Numbers as people write them, exactly: integers, decimals, fractions, mixed numbers, powers, scientific notation.

Every magnitude is bounded before it is evaluated, by digits and exponent, so that a number costs microseconds whatever
it says. Nothing is evaluated but numbers: `12+25` is no numeral, since the echo of a question is no answer.
"""

import re
from fractions import Fraction
from typing import Final, NamedTuple

MAX_DIGITS: Final = 400

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_DECIMAL = re.compile(rf"([-+]?)({_UNSIGNED})(?:[eE]([-+]?\d{{1,4}}))?")
_POWER = re.compile(r"(-?)(\d+|\(-?\d+\))\^(?:\{(-?\d{1,4})\}|(\d))")
_TIMES = re.compile(r"\\cdot|\*")
_LATEX_FRACTION = re.compile(r"([-+]?)(\d*)\\frac\{([^{}]*(?:\{[^{}]*\})?)\}\{([^{}]*(?:\{[^{}]*\})?)\}")
_SLASH_FRACTION = re.compile(r"([-+]?)\(?([^/()]+)\)?/\(?([^/()]+)\)?")


class Numeral(NamedTuple):
    """A number and how it was written.

    Attributes:
        value: Of the number, the percent sign left aside.
        is_percent: Whether it had one: 7 % is neither 7 nor 0.07.
        num_decimals: Digits after the point of a plain decimal; None for every other form.
    """

    value: Fraction
    is_percent: bool
    num_decimals: int | None


def numeral(text: str) -> Numeral | None:
    """The number in canonical text (`verifier.notation`); None where it is none, or too large to look at."""
    if len(text) > 2 * MAX_DIGITS:
        return None
    number = text.removesuffix("%").removesuffix("\\")
    is_percent = text.endswith("%")
    value = _decimal(number)
    if value is not None:
        _, point, decimals = number.partition(".")
        is_plain = bool(point) and decimals.isdecimal()
        return Numeral(value, is_percent, len(decimals) if is_plain else None)
    value = _fraction(number)
    if value is None:
        value = _product(number)
    return None if value is None else Numeral(value, is_percent, None)


def _fraction(text: str) -> Fraction | None:
    r"""`a/b`, `\frac{a}{b}`, and mixed numbers."""
    whole = ""
    if match := _LATEX_FRACTION.fullmatch(text):
        sign, whole, upper, lower = match.groups()
    elif match := _SLASH_FRACTION.fullmatch(text):
        sign, upper, lower = match.groups()
    else:
        return None
    numerator, denominator = _product(upper), _product(lower)
    if numerator is None or not denominator:
        return None
    value = numerator / denominator
    if whole:
        if len(whole) > MAX_DIGITS or value < 0:
            return None
        value += int(whole)
    return -value if sign == "-" else value


def _product(text: str) -> Fraction | None:
    r"""Of at most two decimals or powers, such as `3 \cdot 10^5`."""
    factors = [_power(factor) for factor in _TIMES.split(text, maxsplit=2)]
    if not 1 <= len(factors) <= 2 or None in factors:
        return None
    value = Fraction(1)
    for factor in factors:
        value *= factor or 0
    return value


def _power(text: str) -> Fraction | None:
    match = _POWER.fullmatch(text)
    if match is None:
        return _decimal(text)
    sign, base, exponent = match[1], match[2].strip("()"), int(match[3] or match[4])
    if len(base) * abs(exponent) > MAX_DIGITS or (int(base) == 0 and exponent <= 0):
        return None
    value = Fraction(int(base)) ** exponent
    return -value if sign else value


def _decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return None
    sign, digits, exponent = match[1], match[2].replace(",", ""), int(match[3] or 0)
    if len(digits) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        return None
    value = Fraction(digits) * Fraction(10) ** exponent
    return -value if sign == "-" else value
