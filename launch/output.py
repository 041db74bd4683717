"""What a process wrote before it ended: the one line that says why, and torchrun's word on the exit code."""

import re
from pathlib import Path
from typing import NamedTuple

_TAIL_BYTES = 64 << 10
_OWN = re.compile(r"^(?:\[\w+\]: ?)?sluice: (.+)$", re.MULTILINE)
_EXCEPTION = re.compile(r"^(?:\[\w+\]: ?)?((?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)\b.*)$", re.MULTILINE)
_RANK_EXIT_CODE = re.compile(r"^\s*exitcode\s*:\s*(-?\d+)", re.MULTILINE)
_TORCHRUN = "torch.distributed.elastic"


class LastWords(NamedTuple):
    """The end of a process.

    Attributes:
        line: The most telling line; empty where nothing was written.
        rank_exit_code: Of the first learner rank that failed, as torchrun reports it; torchrun's own is always 1.
    """

    line: str
    rank_exit_code: int | None


def last_words(path: Path, offset: int = 0) -> LastWords:
    """The end of what was written to `path` from byte `offset` on."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(offset, size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    codes = _RANK_EXIT_CODE.findall(text)
    return LastWords(_telling_line(text), int(codes[-1]) if codes else None)


def _telling_line(text: str) -> str:
    """An error of Sluice's own, else the last exception (not torchrun's about it), else the last line."""
    if own := _OWN.findall(text):
        return own[-1]
    if exceptions := [line for line in _EXCEPTION.findall(text) if not line.startswith(_TORCHRUN)]:
        return exceptions[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
