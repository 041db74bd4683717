"""What every accepted message is like, said without the decoder's own code."""

import math
import struct
from enum import Enum
from typing import Any

import msgspec

from common import wire

NAMES = {"name", "run", "generator", "verifier", "prompt_id", "reward", "id", "source", "status"}
EMPTY_NAMES = {"endpoint"}
TEXTS = {"answer", "reason", "waiting_for", "extracted", "stop", "leases"}
LISTED_NAMES = {"verifiers", "publishers"}
MAX_NAME, MAX_TEXT = 1024, 1 << 20


def nonsense(message: wire.Message) -> str:
    """What an accepted message says that none may; empty where it makes sense."""
    return next(_faults(message), "")


def _faults(of: wire.Message) -> Any:
    for field in of.__struct_fields__:
        yield from _value(of, field, getattr(of, field))
    if isinstance(of, wire.Completion):
        yield from _completion(of)
    elif isinstance(of, wire.Manifest):
        yield from _manifest(of)
    elif isinstance(of, wire.PartFiles):
        yield from _part_files(of)
    elif isinstance(of, wire.Prompt) and (not of.token_ids or min(_ints(of.token_ids)) < 0):
        yield f"a prompt of {of.token_ids!r}"


def _value(of: wire.Message, field: str, value: Any) -> Any:
    """Faults of a value, of those in it where it has parts."""
    where = f"{type(of).__name__}.{field} = {value!r:.80}"
    if isinstance(value, (bool, Enum, bytes, memoryview)) or value is None:
        return
    if isinstance(value, msgspec.Struct):
        yield from _faults(value)  # type: ignore[arg-type]
    elif isinstance(value, str):
        yield from _string(field, value, where)
    elif isinstance(value, float):
        if not math.isfinite(value) and not (field in ("accuracy", "pass_at_k") and math.isnan(value)):
            yield where
    elif isinstance(value, int):
        if not 0 <= value < (1 << (63 if field == "revision" else 53)):
            yield where
    elif isinstance(value, dict):
        for key, number in value.items():
            yield from _string("name", key, where)
            yield from _value(of, field, number)
    elif isinstance(value, wire.LeaseKey):
        if not -(1 << 53) < value.visit < (1 << 53) or not 0 <= value.attempt < (1 << 31):
            yield where
    else:
        assert isinstance(value, tuple), where
        for part in value:
            yield from _value(of, field, part)


def _string(field: str, value: str, where: str) -> Any:
    if field in TEXTS:
        if len(value) > MAX_TEXT:
            yield where
        return
    assert field in NAMES | EMPTY_NAMES | LISTED_NAMES, f"{where}: is it a name or a text?"
    if len(value) > MAX_NAME or (not value and field not in EMPTY_NAMES) or any(c < " " or c == "\x7f" for c in value):
        yield where


def _completion(of: wire.Completion) -> Any:
    tokens, logprobs, numbers = _ints(of.token_ids), _floats(of.logprobs), _ints(of.versions)
    ends = numbers[::3]
    if not tokens or len(logprobs) != len(tokens) or len(numbers) % 3 or min(tokens + numbers) < 0:
        yield f"arrays of {len(tokens)}, {len(logprobs)}, {len(numbers)}, or a negative number in one"
    elif any(not -math.inf < x <= 1e-4 for x in logprobs):
        yield f"logprobs {logprobs}"
    elif any(a >= b for a, b in zip((0, *ends), ends, strict=False)) or ends[-1:] != (len(tokens),):
        yield f"spans to {ends} of {len(tokens)} tokens"


def _manifest(of: wire.Manifest) -> Any:
    tokens, logprobs = _ints(of.probe_token_ids), _floats(of.probe_logprobs)
    if len(logprobs) != max(0, len(tokens) - 1) or min(tokens, default=0) < 0 or not all(map(math.isfinite, logprobs)):
        yield f"probes {tokens}, {logprobs}"


def _part_files(of: wire.PartFiles) -> Any:
    for before, after in zip(of.files, of.files[1:], strict=False):
        if after.key.base is None or tuple(after.key.base) != tuple(before.key.version):
            yield f"{after.key} behind {before.key}"
    for file in of.files:
        if file.key.part != of.part:
            yield f"{file.key} of part {of.part}"
        if len(file.sums) != 8 * -(-file.size_bytes // (1 << 20)):
            yield f"{len(file.sums)} bytes of checksums of {file.size_bytes} bytes"


def _ints(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) / 4:g}i", data)


def _floats(data: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(data) / 4:g}f", data)
