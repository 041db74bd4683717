"""Connections that a ROUTER turned away, as its socket monitor tells it."""

import os
import socket

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from common.refusals import PEERS, Refusals

_FAILED = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "found another key, expected the run's",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "found no CURVE or another server's key, expected the run's",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "found a connection that ended in its handshake, expected a whole one",
}
_NO_HANDSHAKE = "found a connection without a handshake, expected ZeroMQ's"
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED


class Doorway:
    """Watches who connects, and counts those who are not let in.

    What this does not do: ZeroMQ says neither why a connection ended after its handshake, were it for a message above
    the limit, nor for certain which connection failed: the address is that of the next one that ends.
    """

    def __init__(self, context: zmq.asyncio.Context, watched: zmq.asyncio.Socket, refusals: Refusals) -> None:
        """Watches from now on; `context` closes the socket that it hears on."""
        self._refusals = refusals
        self._addresses: dict[int, str] = {}
        self._handshakes: dict[int, int] = {}
        self._num_handshakes = 0
        self._failure = ""
        address = f"inproc://doorway-{id(self)}"
        watched.monitor(address, _EVENTS | sum(_FAILED))
        self._socket = context.socket(zmq.PAIR)
        self._socket.linger = 0
        self._socket.rcvhwm = 0  # a full queue would hold up the thread that serves all connections
        self._socket.connect(address)

    async def watch(self) -> None:
        """Counts until cancelled."""
        while True:
            event = parse_monitor_message(await self._socket.recv_multipart())
            self._hear(zmq.Event(event["event"]), event["value"])

    def _hear(self, event: zmq.Event, value: int) -> None:
        """`value` is the connection's file descriptor where it is accepted and where it ends."""
        if event == zmq.EVENT_ACCEPTED:
            self._addresses[value] = _peer_of(value)
            self._handshakes[value] = self._num_handshakes
        elif event == zmq.EVENT_DISCONNECTED:
            address, before = self._addresses.pop(value, "unknown"), self._handshakes.pop(value, self._num_handshakes)
            if self._failure or before == self._num_handshakes:
                self._refusals.add(PEERS, address, self._failure or _NO_HANDSHAKE)
            self._failure = ""
        else:
            self._num_handshakes += 1
            self._failure = _FAILED.get(event, self._failure)


def _peer_of(descriptor: int) -> str:
    """The other end of a connection of another thread; it may have ended already."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            return str(connection.getpeername()[0])
    except (OSError, IndexError):
        return "unknown"
