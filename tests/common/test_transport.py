"""Real sockets on loopback: answers, held requests, silence, a service that moves, and who is let in."""

import asyncio
from pathlib import Path

import pytest
import zmq.asyncio

from common import transport, wire
from common.errors import DeadlineError, RefusedError, RunDirectoryError
from common.rendezvous import Rendezvous, RunKeys
from common.transport import KEEPALIVE_S, Client, Service, ledger_client
from tests.clocks import PATIENCE_S, comes_about, pass_time, run_by_hand, settle

STATUS = wire.Status()


async def answer_done(peer: bytes, request: wire.Request) -> wire.Answer:
    return wire.Done()


def test_a_request_is_answered_under_curve(tmp_path: Path) -> None:
    async def main() -> wire.Done:
        keys = RunKeys.create(tmp_path)
        async with Service(answer_done, keys=keys) as service:
            serving = asyncio.create_task(service.serve())
            async with Client(lambda: service.endpoint, keys=keys, name="service") as client:
                answer = await client.ask(STATUS, wire.Done, deadline_s=PATIENCE_S)
            serving.cancel()
            return answer

    assert asyncio.run(main()) == wire.Done()


def test_a_client_of_another_run_gets_no_answer(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    ours, other = RunKeys.create(tmp_path), RunKeys.create(tmp_path / "other")
    pretender = RunKeys(public=ours.public, secret=other.secret)
    heard: list[wire.Request] = []

    async def hear(peer: bytes, request: wire.Request) -> wire.Answer:
        heard.append(request)
        return wire.Done()

    async def is_refused(keys: RunKeys | None) -> None:
        async with Service(hear, keys=ours) as service:
            serving = asyncio.create_task(service.serve())
            async with Client(lambda: service.endpoint, keys=keys, name="service") as client:
                asking = asyncio.create_task(client.ask_once(STATUS, wire.Done, silence_s=PATIENCE_S))
                await comes_about(lambda: service.refusals.counts["connections"], "a refusal")
                assert not asking.done()
                asking.cancel()
            serving.cancel()

    async def main() -> None:
        for keys in (other, pretender, None):
            await is_refused(keys)
        async with Service(hear, keys=ours) as service:
            serving = asyncio.create_task(service.serve())
            with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
                stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
                stranger.curve_serverkey = ours.public.encode()  # which is no secret: only the list of keys is left
                stranger.linger = 0
                stranger.connect(service.endpoint)
                await stranger.send_multipart([b"request0", wire.encode(STATUS)])
                await comes_about(lambda: heard or service.refusals.counts["connections"], "a refusal")
            async with Client(lambda: service.endpoint, keys=ours, name="service") as client:
                await client.ask(STATUS, wire.Done, deadline_s=PATIENCE_S)
            serving.cancel()

    asyncio.run(main())
    assert heard == [STATUS]


def test_services_that_follow_each_other_at_once_are_all_heard(tmp_path: Path) -> None:
    keys = RunKeys.create(tmp_path)

    async def main() -> None:
        for _ in range(5):
            async with Service(answer_done, keys=keys) as service:
                serving = asyncio.create_task(service.serve())
                async with Client(lambda: service.endpoint, keys=keys, name="service") as client:
                    assert await client.ask(STATUS, wire.Done, deadline_s=PATIENCE_S) == wire.Done()
                serving.cancel()

    asyncio.run(main())


def test_a_held_request_is_not_silence() -> None:
    """The first request is held; what the second one is answered comes after the sign of life for the first."""
    release = asyncio.Event()
    requests: list[wire.Request] = []

    async def hold_the_first(peer: bytes, request: wire.Request) -> wire.Answer:
        requests.append(request)
        if len(requests) == 1:
            await release.wait()
        return wire.Done()

    async def main() -> None:
        async with Service(hold_the_first, keys=None) as service:
            serving = asyncio.create_task(service.serve())
            async with Client(lambda: service.endpoint, keys=None, name="service") as client:
                held = asyncio.create_task(client.ask_once(STATUS, wire.Done, silence_s=1.5 * KEEPALIVE_S))
                await settle()
                for _ in range(4):
                    await client.ask_once(STATUS, wire.Done)
                    await pass_time(KEEPALIVE_S)
                await client.ask_once(STATUS, wire.Done)
                assert not held.done()
                release.set()
                assert await held == wire.Done()
            serving.cancel()

    run_by_hand(main())


def test_a_service_that_moves_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "SILENCE_S", 0.5)  # how soon it looks again; it looks as often as it takes

    async def main() -> None:
        async with Client(lambda: Rendezvous.read(tmp_path).address, keys=None, name="ledger") as client:
            for incarnation in range(2):
                async with Service(answer_done, keys=None) as service:
                    Rendezvous(address=service.endpoint, public_key="", incarnation=incarnation).write(tmp_path)
                    serving = asyncio.create_task(service.serve())
                    assert await client.ask(STATUS, wire.Done, deadline_s=PATIENCE_S) == wire.Done()
                    serving.cancel()

    asyncio.run(main())


def test_waiting_for_a_service_that_never_comes_ends_and_says_for_what(tmp_path: Path) -> None:
    RunKeys.create(tmp_path)

    async def main() -> None:
        async with ledger_client(tmp_path) as client:
            await client.ask(STATUS, wire.Done, deadline_s=0.5)

    with pytest.raises(DeadlineError, match=r"waited 0\.5 s for the ledger to answer Status"):
        asyncio.run(main())


def test_a_refusal_and_an_unexpected_answer_are_errors(tmp_path: Path) -> None:
    async def refuse(peer: bytes, request: wire.Request) -> wire.Answer:
        raise RefusedError("found nothing, expected more")

    async def main() -> None:
        async with Service(refuse, keys=None) as service:
            serving = asyncio.create_task(service.serve())
            async with Client(lambda: service.endpoint, keys=None, name="ledger") as client:
                with pytest.raises(RefusedError, match="the ledger refused Status: found nothing, expected more"):
                    await client.ask(STATUS, wire.Done, deadline_s=PATIENCE_S)
            assert service.refusals.counts["requests"] == 1
            serving.cancel()

    asyncio.run(main())


def test_garbage_from_the_network_is_refused_and_the_service_lives(tmp_path: Path) -> None:
    async def main() -> None:
        async with Service(answer_done, keys=None) as service:
            serving = asyncio.create_task(service.serve())
            context = zmq.asyncio.Context()
            socket = context.socket(zmq.DEALER)
            socket.connect(service.endpoint)
            for frames in ([b""], [b"x"] * 9, [b"request1", b"\xc1garbage"], [b"request2", wire.encode(STATUS)[:-1]]):
                await socket.send_multipart(frames)
            refusals = [wire.decode((await socket.recv_multipart())[1]) for _ in range(2)]
            assert all(isinstance(refusal, wire.Refused) for refusal in refusals)
            async with Client(lambda: service.endpoint, keys=None, name="service") as client:
                assert await client.ask(STATUS, wire.Done, deadline_s=PATIENCE_S) == wire.Done()
            assert service.refusals.counts == {"connections": 0, "malformed": 4, "requests": 0}
            context.destroy(linger=0)
            serving.cancel()

    asyncio.run(main())


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    async def main() -> None:
        async with Service(answer_done, keys=None) as service:
            port = int(service.endpoint.rsplit(":", 1)[1])
            Service(answer_done, keys=None, port=port)

    with pytest.raises(RunDirectoryError, match=r"found 127\.0\.0\.1:\d+ taken .*, expected a free port"):
        asyncio.run(main())


def test_keys_are_private_and_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    RunKeys.create(tmp_path)
    path = tmp_path / "keys.json"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(RunDirectoryError, match="found mode 644, expected 600"):
        RunKeys.load(tmp_path)
