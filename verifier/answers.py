r"""The answer in a response: what a model says last, in the forms that models are taught to answer in.

In this order, looking only at what follows the thoughts: the last `\boxed{}`, the last `####`, the last "Answer:" or
"The answer is", else the response itself where it is one short line. A form that is there but broken or empty is an
empty answer, which is wrong: an earlier, complete one does not count in its place.
"""

import re
from typing import Final

MAX_BARE: Final = 64

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BARE_BOX = re.compile(r"-?[\d.,]*\d|[a-zA-Z]")
_HASHES = re.compile(r"####(.*)")
_PHRASE = re.compile(r"\banswer\b\**(?:\s*:|\s+is\b\s*:?)\**\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.;!?](?:\s|$)")
_THINK, _UNTHINK = "<think>", "</think>"


def answer_in(text: str) -> str | None:
    """The answer; empty where its place is empty, broken or lost in thought; None where there is no place for one."""
    said = without_thoughts(text)
    if said is None:
        return ""
    boxes = list(_BOX.finditer(said))
    if boxes:
        return _in_box(said, boxes[-1].end())
    if found := _HASHES.findall(said):
        return _bare(found[-1])
    if phrases := list(_PHRASE.finditer(said)):
        line = said[phrases[-1].end() :].partition("\n")[0]
        return _bare(_SENTENCE_END.split(line, maxsplit=1)[0])
    said = said.strip()
    return _bare(said) if len(said) <= MAX_BARE and "\n" not in said else None


def reference_in(answer: str) -> str:
    """The answer of a data set's solution: its last box or `####`, else all of it."""
    boxes = list(_BOX.finditer(answer))
    if boxes:
        return _in_box(answer, boxes[-1].end())
    found = _HASHES.findall(answer)
    return _bare(found[-1]) if found else answer.strip()


def without_thoughts(text: str) -> str | None:
    """What follows the last closed thought; None where a thought is still open."""
    said = text.rpartition(_UNTHINK)[2]
    return None if _THINK in said else said


def _in_box(text: str, start: int) -> str:
    """The content of the box that begins at `start`; empty where its braces do not balance."""
    if text[start : start + 1] != "{":
        bare = _BARE_BOX.match(text, start)
        return bare[0] if bare else ""
    depth, position = 0, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : position].strip()
        position += 1
    return ""


def _bare(text: str) -> str:
    """Without emphasis, quotes and the full stop around it."""
    return text.strip().strip('*`"').strip().removesuffix(".").strip("*").strip()
