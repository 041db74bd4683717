"""Which answers are equal, and which must not be."""

import sys
from collections.abc import Callable
from fractions import Fraction
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, strategies as st

from verifier.equivalence import MAX_CHARACTERS, equivalent
from verifier.notation import canonical
from verifier.numerals import MAX_DIGITS, numeral

EQUAL = [
    ("42", "42"),
    ("42", " 42.0 "),
    ("4", "004"),
    ("0", "-0"),
    ("0", "0/7"),
    ("+5", "5"),
    (".5", "0.50"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "2/4"),
    (r"\frac12", r"\dfrac{1}{2}"),
    (r"-\frac{10}{9}", "-10/9"),
    (r"\frac{-10}{9}", "10/-9"),
    (r"918\frac{1}{2}", "918.5"),
    ("1,000", "1000"),
    ("1 000 000", "1000000"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    ("1{,}234.5", "1234.5"),
    ("1e3", "1000"),
    (r"3 \times 10^5", "300000"),
    (r"2.5 \cdot 10^{-3}", "0.0025"),
    ("2^3", "8"),
    (r"\frac{1}{2^{99}}", r"\frac{2}{2^{100}}"),
    (r"7.2\%", "7.20%"),
    (r"$28$ %", r"28\%"),
    (r"90^\circ", "90"),
    (r"17\text{ cm}", "17"),
    (r"\text{13}", "13"),
    (r"\$5", "5"),
    ("x = 3", "3"),
    ("a+b = 12+50 = 62", "62"),
    (r"\mathrm{E}", "E"),
    (r"\left(1,2\right)", "(1, 2)"),
    (r"\left( \frac{3}{2}, -13 \right)", "(1.5, -13)"),
    (r"[1, 2) \cup (3, +\infty)", r"[1,2)\cup(3,\infty)"),
    ("-2, 1, 3", "3, 1, -2"),
    ("1331 and 1728", "1728, 1331"),
    (r"\{1, 2\}", r"\{2,1\}"),
    ("x=1 or x=5", "5, 1"),
    ("52_8", "52_{8}"),
    (r"\sqrt2", r"\sqrt{2}"),
    ("1/3", "0.333333"),
    ("10/3", "3.33333333"),
    ("2/3", "0.666667"),
    ("2/3", "0.666666"),
]
DIFFERENT = [
    ("42", "41"),
    ("5", "5.001"),
    ("5", "5.0000000001"),
    ("5", "4.9999999999"),
    ("1/3", "0.33333"),
    ("1/3", "0.333334"),
    ("1/3", "-0.333333"),
    ("100/3", "33.333"),
    ("1/2", "0.500001"),
    ("7%", "7"),
    ("7%", "0.07"),
    ("1000000", "1,00,0000"),
    ("1213", "12 13"),
    ("12", "1, 2"),
    ("62", "12+50"),
    ("6", "2*3+0"),
    ("3", "n=3k"),
    ("x=3", "y=3"),
    ("y=2x+3", "x=2x+3"),
    ("1", "2x+z=1"),
    ("1", "x<1"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("[2,5)", "(2,5)"),
    ("(1,2)", "(1,2,3)"),
    ("1, 2", "1, 2, 2"),
    ("1, 1, 2", "1, 2, 2"),
    ("x=1 or x=5", "x=7 or x=5"),
    ("a=1 or a=-2", "a=1"),
    ("2", "(2"),
    ("0", "1/0"),
    ("1", "0^0"),
    ("528", "52_8"),
    (r"\text{Yes}", r"\text{No}"),
    (r"\pir", r"\pi r"),
    ("5", ""),
    ("", ""),
    ("5", "5 or 6"),
    ("5", "__import__('os').getcwd()"),
]


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_equal_answers_are_equal_both_ways(left: str, right: str) -> None:
    assert equivalent(left, right)
    assert equivalent(right, left)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different_answers_are_different_both_ways(left: str, right: str) -> None:
    assert not equivalent(left, right)
    assert not equivalent(right, left)


@pytest.mark.parametrize(
    "bomb",
    [
        "9^{9^{9^{9}}}",
        "9^{9999}",
        "1e9999",
        "1e-9999",
        "9" * 100_000,
        "9^9" * 300,
        "1/" * 400 + "1",
        "(" * 900,
        "(" * 400 + "1" + ")" * 400,
        "1," * 490 + "1",
        r"\frac{" * 150 + "1" + "}{2}" * 150,
        "$" * 900,
        r"\text{" * 160,
        " " * 999 + "x",
        "1,111" * 190,
    ],
)
@pytest.mark.timeout(60)  # a thousand times what it takes: against a regular expression that tries all ways
def test_no_answer_takes_long_to_compare(bomb: str) -> None:
    def compare() -> None:
        assert not equivalent(bomb, "1")
        assert not equivalent(bomb, bomb[:-1] + "2")

    assert _num_lines(compare) < 50 * MAX_CHARACTERS


def _num_lines(work: Callable[[], None]) -> int:
    """How many lines of Python are run, which is the same on every machine."""
    num_lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal num_lines
        num_lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return num_lines


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**12), st.integers(1, 1000))
def test_all_forms_of_a_fraction_are_equal(numerator: int, denominator: int, factor: int) -> None:
    sign = "-" if numerator < 0 else ""
    forms = [
        f"{numerator}/{denominator}",
        f"{numerator * factor}/{denominator * factor}",
        rf"{sign}\frac{{{abs(numerator)}}}{{{denominator}}}",
        rf"\dfrac{{{numerator:,}}}{{{denominator}}}",
        f"$ {Fraction(numerator, denominator)} $",
    ]
    assert all(equivalent(left, right) for left in forms for right in forms)
    assert not equivalent(forms[0], f"{numerator + 1}/{denominator}")


@given(st.integers(-(10**20), 10**20), st.integers(0, 12))
def test_a_decimal_is_the_fraction_that_it_writes_out_and_no_other(digits: int, places: int) -> None:
    sign = "-" if digits < 0 else ""
    written = f"{abs(digits):0{places + 1}d}"
    decimal = f"{sign}{written[:-places]}.{written[-places:]}" if places else f"{sign}{written}"
    assert equivalent(decimal, f"{digits}/{10**places}")
    assert equivalent(decimal + ("0" if places else ".0"), decimal)
    assert not equivalent(decimal, f"{digits + 1}/{10**places}")


@given(st.integers(0, 10**15))
def test_separators_of_thousands_do_not_matter(number: int) -> None:
    assert equivalent(f"{number:,}", str(number))
    assert equivalent(f"{number:,}".replace(",", " "), str(number))
    assert equivalent(f"{number:,}".replace(",", "{,}"), str(number))


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_can_be_compared_and_comparison_is_symmetric(left: str, right: str) -> None:
    assert equivalent(left, right) == equivalent(right, left)


@given(st.text(alphabet="0123456789.,/-+^{}()eE%\\frac \\cdot", max_size=40))
def test_a_number_is_exactly_what_was_written(text: str) -> None:
    found = numeral(canonical(text))
    if found is not None:
        assert len(str(found.value.numerator)) + len(str(found.value.denominator)) < 8 * MAX_DIGITS
