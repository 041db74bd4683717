r"""One spelling for each of the many that LaTeX has for the same thing."""

import re
from typing import Final

_SPELLINGS: Final = (
    (r"\\?\$|\\[()\[\]]", " "),
    (r",\s*\\!\s*", "{,}"),
    (r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\s,?(?:and|or)\s|,\s*(?:and|or)\s", ","),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])", ""),
    (r"\\[,;:!> ]|\\q?quad(?![a-zA-Z])|~|\\hspace\{[^{}]*\}", " "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\(?:leq?|leqslant)(?![a-zA-Z])|≤", "<="),
    (r"\\(?:geq?|geqslant)(?![a-zA-Z])|≥", ">="),
    (r"\\(?:neq?)(?![a-zA-Z])|≠", "!="),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°|\\degree(?![a-zA-Z])", ""),
    (r"[−–]", "-"),
    (r"\\times(?![a-zA-Z])|×|·", r"\\cdot "),
    (r"π", r"\\pi "),
    (r"\+\s*\\infty", r"\\infty"),
    (r"\*\*", "^"),
)
_PATTERNS: Final = tuple((re.compile(pattern), spelling) for pattern, spelling in _SPELLINGS)
_STYLED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit|mbox|operatorname|textrm|mathit)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d}])\s*\\(?:text|mathrm|mbox|textrm)\s*\{[^{}%]*\}\s*$")
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}| |,)\d{3})+(?!\d)")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:(\d)|\{([^{}]*)\})\s*(?:(\d)|\{([^{}]*)\})")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([a-zA-Z0-9])")
_SINGLE = re.compile(r"([_^])\{(\w)\}")
_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)|(?<=[a-zA-Z])\s+(?=\d)|(?<=\d)\s+(?=[a-zA-Z])")


def canonical(text: str) -> str:
    """An answer in one spelling, without spaces, mathematics delimiters, styles, units of one number, and degrees."""
    text = _spell(text.strip().removesuffix(".")).removesuffix("\\").strip()
    text = _GROUPED.sub(_ungroup, _UNIT.sub("", text))
    text = _STYLED.sub(r"\1", text)
    text = _SHORT_FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)
    text = _SINGLE.sub(r"\1\2", _SHORT_ROOT.sub(r"\\sqrt{\1}", text))
    return _without_spaces(text)


def _spell(text: str) -> str:
    for pattern, spelling in _PATTERNS:
        text = pattern.sub(spelling, text)
    return " ".join(text.split())


def _ungroup(match: re.Match[str]) -> str:
    """A number without the separators of its thousands, where they are all of one kind."""
    separators = set(re.split(r"\d+", match[0])[1:-1])
    return re.sub(r"\D", "", match[0]) if len(separators) == 1 else match[0]


def _without_spaces(text: str) -> str:
    r"""Spaces go, but for those between two letters or two digits: `\pi r` is not `\pir`, and `1 2` is not 12."""
    return _SPACE.sub("", text)
