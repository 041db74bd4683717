"""Requests and answers over ZeroMQ: a DEALER asks, a ROUTER answers, both under CURVE.

Frames: [request id, message] there, [request id, message] back. [nothing, request ids] back says "still at it": every
two seconds a service names to each peer the requests that it holds, so that a slow peer is never mistaken for a dead
one, and silence always means trouble. Requests may be re-sent with the same meaning: every message that must not be
lost is idempotent.

What this does not do: it keeps no request across a crash of the client (who asks again), and high-water marks are not
its flow control (a verifier's room and a ledger's leases are).
"""

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from common import wire
from common.doorway import Doorway
from common.errors import DeadlineError, RefusedError, RunDirectoryError, SilenceError, SluiceError, WireError
from common.refusals import MALFORMED, REFUSED, Refusals
from common.rendezvous import Rendezvous, RunKeys

KEEPALIVE_S = 2.0
SILENCE_S = 5.0
_HEARTBEAT_MS = 2_000
_ID_BYTES = 8
_ALIVE = b""

A = TypeVar("A", bound=wire.Message)
Handler = Callable[[bytes, wire.Request], Awaitable[wire.Message]]


def _secure(socket: zmq.asyncio.Socket, keys: RunKeys | None, *, server: bool, max_bytes: int) -> None:
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = 0
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 5 * _HEARTBEAT_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    if keys is None:
        return
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()
    if server:
        socket.curve_server = True
        socket.zap_domain = b"sluice"
    else:
        socket.curve_serverkey = keys.public.encode()


class _OnlyThisRun:
    """ZAP's credentials provider: a client is let in if it holds the run's key."""

    def __init__(self, public: str) -> None:
        self._key = public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the client with this key, as Z85, is let in."""
        del domain
        return key == self._key


class Service:
    """A ROUTER that answers requests, each in a task of its own.

    Use as an async context manager inside the event loop that will own the socket.

    Attributes:
        endpoint: Where it listens.
        refusals: What it turned away.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        keys: RunKeys | None,
        host: str = "127.0.0.1",
        port: int = 0,
        max_request_bytes: int = wire.MAX_MESSAGE_BYTES,
        max_queued: int = 0,
        num_io_threads: int = 1,
    ) -> None:
        """Listens.

        Args:
            handler: Gets the peer's identity and the request.
            keys: Of the run; None is open to all.
            host: The address to bind.
            port: 0 takes a free one.
            max_request_bytes: The connection of a peer that sends a larger one is closed, before it takes memory.
            max_queued: Answers that wait for one peer to read them; those beyond are dropped, for one who asks again. 0
                sets no limit.
            num_io_threads: Threads that encrypt and send; one connection keeps one busy.

        Raises:
            RunDirectoryError: The port is taken.
        """
        self._handler = handler
        self._context = zmq.asyncio.Context(num_io_threads)
        self._authenticator: AsyncioAuthenticator | None = None
        self._keys = keys
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.router_handover = True
        _secure(self._socket, keys, server=True, max_bytes=max_request_bytes)
        self._socket.sndhwm = max_queued
        self.refusals = Refusals()
        self._doorway = Doorway(self._context, self._socket, self.refusals)
        try:
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise RunDirectoryError(f"found {host}:{port} taken ({error}), expected a free port") from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._held: dict[tuple[bytes, bytes], asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        if self._keys is not None:
            self._authenticator = AsyncioAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback("sluice", credentials_provider=_OnlyThisRun(self._keys.public))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        try:
            # Its cancelled task takes its descriptor out of the loop in the second turn from here. Were that closed
            # before, another socket with its number would be deaf.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        finally:
            self._context.destroy(linger=0)

    async def serve(self) -> None:
        """Answers until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_alive())
            tasks.create_task(self._doorway.watch())
            while True:
                frames = await self._socket.recv_multipart()
                if len(frames) != 3 or len(frames[1]) != _ID_BYTES:
                    reason = f"found {len(frames) - 1} frames, expected an id of 8 bytes and a message"
                    self.refusals.add(MALFORMED, frames[0].hex(), reason)
                    continue
                peer, request_id, data = frames
                if (peer, request_id) not in self._held:
                    task = tasks.create_task(self._answer(peer, request_id, data))
                    self._held[peer, request_id] = task

    async def _answer(self, peer: bytes, request_id: bytes, data: bytes) -> None:
        try:
            request = wire.decode(data)
            if not isinstance(request, wire.Request):
                raise WireError(f"found {type(request).__name__}, expected a request")
            answer = await self._handler(peer, request)
        except SluiceError as error:
            kind = MALFORMED if isinstance(error, WireError) else REFUSED
            self.refusals.add(kind, peer.hex(), str(error))
            answer = wire.Refused(reason=str(error))
        finally:
            del self._held[peer, request_id]
        await self._socket.send_multipart([peer, request_id, wire.encode(answer)], copy=False)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEPALIVE_S)
            held: dict[bytes, list[bytes]] = {}
            for peer, request_id in self._held:
                held.setdefault(peer, []).append(request_id)
            for peer, request_ids in held.items():
                await self._socket.send_multipart([peer, _ALIVE, b"".join(request_ids)])


class Client:
    """A DEALER that asks one service, found anew by `locate` whenever it falls silent.

    To the service it is one peer as long as it lives, over all its connections. Use as an async context manager inside
    the event loop that will own the socket.
    """

    def __init__(self, locate: Callable[[], str], *, keys: RunKeys | None, name: str) -> None:
        """`locate` returns the endpoint, or raises FileNotFoundError while there is none; `name` is for messages."""
        self._locate = locate
        self._name = name
        self._keys = keys
        self._context = zmq.asyncio.Context()
        self._endpoint = ""
        self._socket: zmq.asyncio.Socket | None = None
        self._identity = b"p" + os.urandom(15)
        self._ids = itertools.count(int.from_bytes(os.urandom(6), "big"))
        self._answers: dict[bytes, asyncio.Queue[memoryview]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.cancel()
        self._context.destroy(linger=0)

    async def ask(self, message: wire.Request, expect: type[A], *, deadline_s: float) -> A:
        """The service's answer. Asks again whenever the service falls silent.

        Args:
            message: The request.
            expect: The type of its answer.
            deadline_s: How long the service may be silent before this gives up.

        Raises:
            RefusedError: The service refuses.
            DeadlineError: No sign of life for `deadline_s`.
        """
        heard = time.monotonic()
        while True:
            try:
                return await self.ask_once(message, expect, silence_s=min(SILENCE_S, deadline_s))
            except SilenceError as error:
                self._disconnect()
                if time.monotonic() - heard > deadline_s:
                    raise DeadlineError(
                        f"waited {deadline_s:g} s for the {self._name} to answer {type(message).__name__}"
                    ) from error

    async def ask_once(self, message: wire.Request, expect: type[A], *, silence_s: float = SILENCE_S) -> A:
        """The service's answer.

        Raises:
            RefusedError: The service refuses.
            SilenceError: Neither an answer nor a sign of life for `silence_s`.
        """
        request_id = next(self._ids).to_bytes(_ID_BYTES, "big")
        answers = self._answers[request_id] = asyncio.Queue()
        try:
            async with asyncio.timeout(silence_s) as patience:
                await (await self._connected(silence_s)).send_multipart([request_id, wire.encode(message)], copy=False)
                while not (data := await answers.get()):
                    patience.reschedule(asyncio.get_running_loop().time() + silence_s)
        except TimeoutError as error:
            raise SilenceError(f"the {self._name} was silent for {silence_s:g} s") from error
        finally:
            del self._answers[request_id]
        answer = wire.decode(data)
        if isinstance(answer, wire.Refused):
            raise RefusedError(f"the {self._name} refused {type(message).__name__}: {answer.reason}")
        if not isinstance(answer, expect):
            raise WireError(f"found {type(answer).__name__} from the {self._name}, expected {expect.__name__}")
        return answer

    async def _connected(self, wait_s: float) -> zmq.asyncio.Socket:
        give_up = time.monotonic() + wait_s
        while self._socket is None:
            try:
                self._connect(self._locate())
            except FileNotFoundError:
                if time.monotonic() > give_up:
                    raise TimeoutError from None
                await asyncio.sleep(0.05)
        return self._socket

    def _connect(self, endpoint: str) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.routing_id = self._identity
        _secure(self._socket, self._keys, server=False, max_bytes=wire.MAX_MESSAGE_BYTES)
        self._socket.connect(endpoint)
        self._endpoint = endpoint
        self._reader = asyncio.create_task(self._read(self._socket))

    def _disconnect(self) -> None:
        """Drops the connection where the service has moved; ZeroMQ itself reconnects to the same address."""
        try:
            moved = self._locate() != self._endpoint
        except FileNotFoundError:
            moved = True
        if moved and self._socket is not None and self._reader is not None:
            self._reader.cancel()
            self._socket.close(linger=0)
            self._socket = None

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart(copy=False)
            request_id, data = frames[0].bytes, frames[1].buffer
            if request_id == _ALIVE:
                for start in range(0, len(data), _ID_BYTES):
                    self._hand_over(bytes(data[start : start + _ID_BYTES]), memoryview(_ALIVE))
            else:
                self._hand_over(request_id, data)

    def _hand_over(self, request_id: bytes, data: memoryview) -> None:
        if (waiter := self._answers.get(request_id)) is not None:
            waiter.put_nowait(data)


def ledger_client(run_dir: Path) -> Client:
    """A client of the run's ledger, wherever the rendezvous file says that it listens."""
    return Client(lambda: Rendezvous.read(run_dir).address, keys=RunKeys.load(run_dir), name="ledger")
