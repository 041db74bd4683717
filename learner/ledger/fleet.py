"""Who is in the run: members, their beats and their rates. No sockets, no clock of its own."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from common import wire
from common.errors import RefusedError

RATE_WINDOW_S = 60.0
MIN_PACE_S = 1.0
MAX_BEATS_PER_S = 1000


class _Rates(NamedTuple):
    """What `wire.Stats` say of one interval: until when, how long, how long busy, and how much was done."""

    end: float
    seconds: float
    busy_s: float
    num_tokens: int
    num_items: int


@dataclass(slots=True, kw_only=True)
class Process:
    """A process that said hello.

    Attributes:
        role: What it is.
        name: Which it is.
        endpoint: Where it listens; empty for all but verifiers.
        joined_at: Wall-clock seconds since the epoch.
        heard_at: When it last said anything.
        peer: Who speaks under the name; empty where it was read from the file and has not been heard since.
        started_at: When the process itself began.
        rates: Of the last minute, oldest first.
        gauges: The newest.
    """

    role: wire.Role
    name: str
    endpoint: str
    joined_at: float
    heard_at: float
    peer: bytes = b""
    started_at: float = 0.0
    rates: deque[_Rates] = field(default_factory=deque)
    gauges: dict[str, float] = field(default_factory=dict)

    def count(self, stats: wire.Stats, now: float) -> None:
        """Takes what the process did since its last beat."""
        seconds, busy_s = stats.interval.end - stats.interval.start, sum(s.end - s.start for s in stats.busy)
        self.rates.append(_Rates(stats.interval.end, seconds, busy_s, stats.num_tokens, stats.num_items))
        self.gauges = stats.gauges
        while len(self.rates) > 1 and self.rates[0].end < now - RATE_WINDOW_S:
            self.rates.popleft()

    def member(self, now: float) -> wire.Member:
        """The process as others see it."""
        rates = [each for each in self.rates if each.end >= now - RATE_WINDOW_S]
        seconds = sum(each.seconds for each in rates) or 1.0
        return wire.Member(
            role=self.role,
            name=self.name,
            seconds=now - self.joined_at,
            silent_s=now - self.heard_at,
            busy_share=min(1.0, sum(each.busy_s for each in rates) / seconds),
            tokens_per_s=sum(each.num_tokens for each in rates) / seconds,
            items_per_s=sum(each.num_items for each in rates) / seconds,
            gauges=self.gauges,
        )


class Fleet:
    """All processes that are alive, by name.

    Attributes:
        num_sampled: Tokens that generators have reported since the ledger started.
    """

    def __init__(self, members: list[tuple[str, str, str]], now: float) -> None:
        """`members` are name, role and endpoint of those who were alive when the ledger was last."""
        self._processes = {
            name: Process(role=wire.Role(role), name=name, endpoint=endpoint, joined_at=now, heard_at=now)
            for name, role, endpoint in members
        }
        self.num_sampled = 0

    def __contains__(self, name: str) -> bool:
        """Whether the process is known."""
        return name in self._processes

    def knows(self, hello: wire.Hello, peer: bytes) -> bool:
        """Whether a hello was heard before.

        Raises:
            RefusedError: It is of an older process than the one that has the name.
        """
        process = self._processes.get(hello.name)
        if process is None:
            return False
        if hello.started_at < process.started_at:
            raise RefusedError(f"found a hello of an older {hello.name}, expected the one that joined in its place")
        return (process.peer, process.started_at) == (peer, hello.started_at)

    def join(self, hello: wire.Hello, now: float, peer: bytes = b"") -> None:
        """A process is alive from now on, in place of an older one of its name."""
        self._processes[hello.name] = Process(
            role=hello.role,
            name=hello.name,
            endpoint=hello.endpoint,
            joined_at=now,
            heard_at=now,
            peer=peer,
            started_at=hello.started_at,
        )

    def leave(self, name: str) -> bool:
        """Forgets a process that is about to end; returns whether it was known."""
        return self._processes.pop(name, None) is not None

    def admit(self, name: str, role: wire.Role, peer: bytes) -> None:
        """Lets a peer speak under a name, which from then on is its own; a name that is not known is anyone's.

        Raises:
            RefusedError: The name is of another role, or of another process that joined in its place.
        """
        process = self._processes.get(name)
        if process is None:
            return
        if process.role is not role:
            raise RefusedError(f"found {name} as {role}, expected {process.role}: that is how it joined")
        process.peer = process.peer or peer
        if process.peer != peer:
            raise RefusedError(f"found {name} of another process, expected the one that joined last")

    def beat(self, beat: wire.Beat, now: float) -> bool:
        """Takes a sign of life; False where the process has to say hello first."""
        process = self._processes.get(beat.name)
        if process is None:
            return False
        process.heard_at = now
        if beat.stats is not None:
            self.num_sampled += beat.stats.num_tokens if process.role is wire.Role.GENERATOR else 0
            process.count(beat.stats, now)
        return True

    def pace_s(self, timeout_s: float) -> float:
        """How long a process waits between beats, of which the ledger hears a thousand a second at most.

        In a fleet so large that a beat would come too late for `timeout_s`, it hears more.
        """
        return min(max(MIN_PACE_S, len(self._processes) / MAX_BEATS_PER_S), max(MIN_PACE_S, timeout_s / 3))

    def remove_silent(self, now: float, timeout_s: float) -> list[Process]:
        """Forgets those that were silent for longer than `timeout_s`, and returns them."""
        silent = [process for process in self._processes.values() if now - process.heard_at > timeout_s]
        for process in silent:
            del self._processes[process.name]
        return silent

    def endpoints(self) -> tuple[str, ...]:
        """Where the verifiers listen."""
        processes = self._processes.values()
        return tuple(sorted(p.endpoint for p in processes if p.role is wire.Role.VERIFIER and p.endpoint))

    def count(self, role: wire.Role) -> int:
        """How many processes of a role are alive."""
        return sum(process.role is role for process in self._processes.values())

    def members(self, now: float) -> tuple[wire.Member, ...]:
        """Everyone, by role and name."""
        processes = sorted(self._processes.values(), key=lambda p: (p.role, p.name))
        return tuple(process.member(now) for process in processes)
