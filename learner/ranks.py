"""What the learner's ranks tell each other beside Megatron's own traffic: bytes, over gloo, on the CPU."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist

from common import errors
from common.errors import SluiceError

COLLECTIVE_TIMEOUT = timedelta(hours=2)  # ranks wait for the first one, and that one for groups: it has the deadline

T = TypeVar("T")
Group = dist.ProcessGroup | None


class _Failure(msgspec.Struct, frozen=True, tag=True):
    """What went wrong on the first rank."""

    kind: str
    message: str


class _Answer(msgspec.Struct, frozen=True, tag=True):
    """What the first rank has to say, encoded."""

    data: msgspec.Raw


class Ranks:
    """All ranks of the learner. Each must make the same calls in the same order.

    The first one alone talks to the ledger and writes to the run directory; what it hears, all act on.

    Attributes:
        rank: This rank's number.
        size: How many there are.
    """

    def __init__(self) -> None:
        """Those of torch's process group, which the policy joins; one alone where there is none."""
        joined = dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that talks for all."""
        return self.rank == 0

    def new_group(self) -> Group:
        """A group of all ranks for what goes on beside these calls; None where there is one rank."""
        if self.size == 1:
            return None
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def share(self, answer: Callable[[], T], kind: type[T]) -> T:
        """What the first rank's `answer` returns, on every rank; the others do not call theirs.

        Args:
            answer: Called on the first rank.
            kind: Its type, as msgspec decodes it.

        Raises:
            SluiceError: `answer` raised it on the first rank; all ranks do, so that they can stop together.
        """
        if self.size == 1:
            return answer()
        if not self.is_first:
            return _opened(self._broadcast(b""), kind)
        try:
            value = answer()
        except SluiceError as error:
            self._broadcast(msgspec.msgpack.encode(_Failure(type(error).__name__, str(error))))
            raise
        self._broadcast(msgspec.msgpack.encode(_Answer(msgspec.Raw(msgspec.msgpack.encode(value)))))
        return value

    def raise_together(self, error: SluiceError | None) -> None:
        """Raises what went wrong on this rank or on another: on all ranks, that of the first of them.

        Raises:
            SluiceError: Something did.
        """
        failure = None if error is None else _Failure(type(error).__name__, str(error))
        for data in self.gather(msgspec.msgpack.encode(failure)):
            if failure := msgspec.msgpack.decode(data, type=_Failure | None):
                raise _opened_error(failure)

    def gather(self, data: bytes, group: Group = None) -> list[bytes]:
        """The data of every rank, in their order, on every rank; in another thread by a group of its own."""
        if self.size == 1:
            return [data]
        own = torch.tensor([len(data)])
        sizes = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(sizes, own, group)
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group)
        return [part[:length].numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]

    def _broadcast(self, data: bytes) -> bytes:
        """The first rank's data."""
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=0)
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(size)).byte()
        dist.broadcast(content, src=0)
        return data or content.numpy().tobytes()


def _opened(data: bytes, kind: type[T]) -> T:
    answer = msgspec.msgpack.decode(data, type=_Failure | _Answer)
    if isinstance(answer, _Failure):
        raise _opened_error(answer)
    return msgspec.msgpack.decode(answer.data, type=kind)


def _opened_error(failure: _Failure) -> SluiceError:
    error: SluiceError = getattr(errors, failure.kind, SluiceError)(failure.message)
    return error
