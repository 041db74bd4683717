"""A verifier that loses every third message, requests and answers alike: for a directory on PYTHONPATH, in tests alone.

Python imports this module by its name when it starts. It does nothing in other processes.
"""

import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

EVERY = 3


def _lose(receive: Callable[..., Any], notes: str) -> Callable[..., Any]:
    """`receive` as if every third request, and every third answer, had never come; ZeroMQ's handshakes are let through.

    Each kind has a count of its own: room, group and verdict come in turns, and one count would lose verdicts alone.
    """
    import zmq

    numbers = {zmq.ROUTER: itertools.count(1), zmq.DEALER: itertools.count(1)}

    async def receive_some(socket: Any, *arguments: Any, **options: Any) -> Any:
        while True:
            frames = await receive(socket, *arguments, **options)
            if socket.type not in numbers or next(numbers[socket.type]) % EVERY:
                return frames
            with open(notes, "a") as file:  # noqa: ASYNC230, PTH123
                file.write("x")

    return receive_some


if sys.orig_argv[1:3] == ["-m", "verifier"] and "LOSSY_NOTES" in os.environ:
    import zmq.asyncio

    zmq.asyncio.Socket.recv_multipart = _lose(zmq.asyncio.Socket.recv_multipart, os.environ["LOSSY_NOTES"])
