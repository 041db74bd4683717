"""Files of weights on their way: whole and right, or not there; whoever lies, dies, stalls or never reads."""

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from common import wire
from common.errors import DeadlineError, RefusedError, RunDirectoryError, SilenceError, SluiceError, WeightsError
from common.refusals import PEERS
from common.rendezvous import RunKeys
from common.transport import Handler
from common.weights import pulling
from common.weights.partial import Partial, describe
from common.weights.shelf import BUSY_AT_END_S, BUSY_S, NUM_CONNECTIONS, Shelf
from tests.clocks import PATIENCE_S, ManualClock, SkippingLoop, move_time
from tests.common.transferring import CHUNK, KEY, file_of, publisher, puller_of, serving, until
from tests.learner.test_checkpoints import limited_files

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("size_bytes", [0, 1, CHUNK, CHUNK + 1, 20 * CHUNK + 5])
def test_a_file_comes_whole(tmp_path: Path, keys: RunKeys, size_bytes: int) -> None:
    async def scenario() -> None:
        content = file_of(tmp_path / "file", size_bytes)
        async with publisher(keys, content, tmp_path / "file") as (shelf, endpoint):
            puller = puller_of(keys)
            await puller.pull(content, tmp_path / "pulled", endpoint)
        assert puller.bytes_in == size_bytes == shelf.bytes_out

    asyncio.run(scenario())
    assert (tmp_path / "pulled").read_bytes() == (tmp_path / "file").read_bytes()
    assert not list(tmp_path.glob(".*"))


def liar(content: wire.Content, path: Path, lie: Callable[[int, bytes], bytes], lies: int) -> Handler:
    """A source that lies about each chunk so many times."""
    shelf, told = Shelf(), Counter[int]()
    shelf.add(content, path)

    async def handle(peer: bytes, request: wire.Request) -> wire.Message:
        del peer
        assert isinstance(request, wire.ChunkRequest)
        chunk = shelf.chunk(request)
        told[request.index] += 1
        lies_now = told[request.index] <= lies
        return wire.Chunk(data=memoryview(lie(request.index, bytes(chunk.data)))) if lies_now else chunk

    return handle


def flipped(index: int, data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:] if index == 2 else data


def truncated(index: int, data: bytes) -> bytes:
    return data[:-1] if index == 2 else data


LIES: dict[str, Callable[[int, bytes], bytes]] = {
    "flipped": flipped,
    "of another version": lambda index, data: bytes(len(data)) if index == 2 else data,
    "truncated": truncated,
    "longer": lambda index, data: data + b"x" if index == 2 else data,
    "empty": lambda index, data: b"" if index == 2 else data,
}


@pytest.mark.parametrize("lie", LIES)
def test_damage_on_the_way_is_found_and_asked_for_again(tmp_path: Path, keys: RunKeys, lie: str) -> None:
    async def scenario() -> None:
        content = file_of(tmp_path / "file", 5 * CHUNK)
        async with serving(liar(content, tmp_path / "file", LIES[lie], lies=1), keys) as service:
            puller = puller_of(keys)
            await puller.pull(content, tmp_path / "pulled", service.endpoint)
        assert puller.num_damaged == 1

    asyncio.run(scenario())
    assert (tmp_path / "pulled").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("lie", LIES)
def test_a_source_that_always_lies_is_an_error_that_names_version_part_chunk_and_peer(
    tmp_path: Path, keys: RunKeys, lie: str
) -> None:
    async def scenario() -> str:
        content = file_of(tmp_path / "file", 5 * CHUNK)
        async with serving(liar(content, tmp_path / "file", LIES[lie], lies=1000), keys) as service:
            with pytest.raises(WeightsError) as caught:
                await puller_of(keys).pull(content, tmp_path / "pulled", service.endpoint)
            assert str(caught.value).startswith(f"{KEY}: chunk 2 from {service.endpoint}: found other bytes than were ")
        return str(caught.value)

    assert "part-00003.0.7.from-0.6" in asyncio.run(scenario())
    assert not (tmp_path / "pulled").exists()


def test_chunks_in_each_others_place_and_chunks_that_come_twice_make_no_wrong_file(
    tmp_path: Path, keys: RunKeys
) -> None:
    async def scenario() -> None:
        content = file_of(tmp_path / "file", 4 * CHUNK)
        chunks = [(tmp_path / "file").read_bytes()[i * CHUNK : (i + 1) * CHUNK] for i in range(4)]
        reordered = liar(content, tmp_path / "file", lambda index, _: chunks[(index + 1) % 4], lies=1)
        async with serving(reordered, keys) as service:
            puller = puller_of(keys)
            await puller.pull(content, tmp_path / "pulled", service.endpoint)
            assert puller.num_damaged == 4
        async with twice(keys, chunks) as endpoint:
            await puller_of(keys).pull(content, tmp_path / "again", endpoint)

    asyncio.run(scenario())
    for name in ("pulled", "again"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "file").read_bytes()


@asynccontextmanager
async def twice(keys: RunKeys, chunks: list[bytes]) -> AsyncGenerator[str]:
    """A bare ROUTER that sends each answer two times."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    socket.curve_server, socket.curve_secretkey = True, keys.secret.encode()
    port = socket.bind_to_random_port("tcp://127.0.0.1")

    async def answer() -> None:
        while True:
            peer, request_id, data = await socket.recv_multipart()
            request = wire.decode(data)
            assert isinstance(request, wire.ChunkRequest)
            for _ in range(2):
                await socket.send_multipart(
                    [peer, request_id, wire.encode(wire.Chunk(data=memoryview(chunks[request.index])))]
                )

    task = asyncio.create_task(answer())
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        task.cancel()
        context.destroy(linger=0)


def test_a_file_that_is_taken_away_while_it_is_pulled_is_an_error_and_no_file(tmp_path: Path, keys: RunKeys) -> None:
    async def scenario() -> None:
        content = file_of(tmp_path / "file", 40 * CHUNK)
        async with publisher(keys, content, tmp_path / "file") as (shelf, endpoint):
            puller = puller_of(keys)
            pull = asyncio.create_task(puller.pull(content, tmp_path / "pulled", endpoint))
            await until(lambda: puller.bytes_in > 5 * CHUNK)
            shelf.remove(KEY)
            refused = r"from-0\.6: chunk \d+ from tcp:\S+: the publisher refused ChunkRequest: found no part-00003"
            with pytest.raises(RefusedError, match=refused):
                await pull

    asyncio.run(scenario())
    assert not (tmp_path / "pulled").exists()


def test_no_more_than_what_is_missing_is_pulled_again_and_damage_at_rest_is_missing(
    tmp_path: Path, keys: RunKeys
) -> None:
    async def scenario() -> None:
        content = file_of(tmp_path / "file", 40 * CHUNK)
        path = tmp_path / "pulled"
        async with publisher(keys, content, tmp_path / "file") as (_, endpoint):
            first, second = puller_of(keys), puller_of(keys)
            pull = asyncio.create_task(first.pull(content, path, endpoint))
            await until(lambda: first.bytes_in > 9 * CHUNK)
            pull.cancel()
            await asyncio.gather(pull, return_exceptions=True)
            missing = Partial.open(content, path).missing
            assert 0 < len(missing) <= 31
            with path.with_name(".pulled.partial").open("rb+") as file:
                file.seek(min(set(range(40)) - missing) * CHUNK)
                file.write(b"damage")
            await second.pull(content, path, endpoint)
            assert second.bytes_in == (len(missing) + 1) * CHUNK

    asyncio.run(scenario())
    assert (tmp_path / "pulled").read_bytes() == (tmp_path / "file").read_bytes()


def test_what_is_left_of_another_file_is_not_taken_up(tmp_path: Path, keys: RunKeys) -> None:
    async def scenario() -> None:
        file_of(tmp_path / ".pulled.partial", 5 * CHUNK)
        content = file_of(tmp_path / "file", 4 * CHUNK)
        async with publisher(keys, content, tmp_path / "file") as (_, endpoint):
            await puller_of(keys).pull(content, tmp_path / "pulled", endpoint)

    asyncio.run(scenario())
    assert (tmp_path / "pulled").read_bytes() == (tmp_path / "file").read_bytes()
    assert not list(tmp_path.glob(".*"))


PROCESS = """
import asyncio, sys
from pathlib import Path
import msgspec
from common import wire
from common.rendezvous import RunKeys
from tests.common.transferring import publisher, puller_of
directory, what, argument = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
content = msgspec.msgpack.decode((directory / "content").read_bytes(), type=wire.Content)
keys = RunKeys.load(directory)
async def publish():
    async with publisher(keys, content, directory / "file", int(argument)) as (_, endpoint):
        print(endpoint, flush=True)
        await asyncio.sleep(6000)
async def pull():
    print("pulling", flush=True)
    await puller_of(keys).pull(content, directory / "pulled", argument)
asyncio.run(publish() if what == "publish" else pull())
"""


@contextmanager
def process(directory: Path, *arguments: str) -> Generator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", PROCESS, str(directory), *arguments]
    started = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def said(started: "subprocess.Popen[str]") -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


def test_a_killed_puller_leaves_no_file_and_its_successor_goes_on(tmp_path: Path, keys: RunKeys) -> None:
    async def scenario() -> None:
        content = file_of(tmp_path / "file", 100 * CHUNK)
        (tmp_path / "content").write_bytes(msgspec.msgpack.encode(content))
        async with publisher(keys, content, tmp_path / "file") as (shelf, endpoint):
            with process(tmp_path, "pull", endpoint) as killed:
                await asyncio.to_thread(said, killed)
                await until(lambda: shelf.bytes_out > 20 * CHUNK)
                os.kill(killed.pid, signal.SIGKILL)
            assert not (tmp_path / "pulled").exists()
            missing = Partial.open(content, tmp_path / "pulled").missing
            assert 0 < len(missing) <= 100 - 20 + NUM_CONNECTIONS * pulling.CREDITS
            puller = puller_of(keys)
            await puller.pull(content, tmp_path / "pulled", endpoint)
            assert puller.bytes_in == len(missing) * CHUNK

    asyncio.run(scenario())
    assert (tmp_path / "pulled").read_bytes() == (tmp_path / "file").read_bytes()


def test_a_killed_publisher_is_an_error_by_the_deadline_and_one_at_its_port_goes_on(
    tmp_path: Path, keys: RunKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = file_of(tmp_path / "file", 300 * CHUNK)
    (tmp_path / "content").write_bytes(msgspec.msgpack.encode(content))
    monkeypatch.setattr(pulling, "CREDITS", 1)

    async def scenario() -> None:
        with process(tmp_path, "publish", "0") as first:
            endpoint, puller = await asyncio.to_thread(said, first), puller_of(keys)
            pull = asyncio.create_task(puller.pull(content, tmp_path / "pulled", endpoint))
            await until(lambda: puller.bytes_in > 10 * CHUNK)
        while not pull.done():
            move_time(PATIENCE_S)
            await asyncio.sleep(0.01)
        with pytest.raises(DeadlineError, match=rf"part-00003\.0\.7\.from-0\.6: .*{endpoint}"):
            await pull
        assert not (tmp_path / "pulled").exists()
        with process(tmp_path, "publish", endpoint.rpartition(":")[2]) as second:
            await asyncio.to_thread(said, second)
            rest = puller_of(keys)
            await rest.pull(content, tmp_path / "pulled", endpoint)
            assert rest.bytes_in <= 300 * CHUNK - 10 * CHUNK

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(scenario())
    assert (tmp_path / "pulled").read_bytes() == (tmp_path / "file").read_bytes()


def test_chunks_that_are_slower_than_was_thought_are_waited_for_longer_each_time(tmp_path: Path) -> None:
    silences: list[float] = []

    class Slow:
        async def ask_once(self, request: wire.ChunkRequest, expect: type[wire.Chunk], *, silence_s: float) -> Any:
            silences.append(silence_s)
            if len(silences) % 4:
                raise SilenceError
            return expect(data=memoryview(bytes([request.index])))

    async def scenario() -> list[bytes]:
        client: Any = Slow()
        partial = Partial.open(file_of(tmp_path / "file", 2 * CHUNK), tmp_path / "pulled")
        transfer = pulling._Transfer("publisher", partial, PATIENCE_S)
        room = asyncio.Semaphore(1)
        return [bytes((await transfer.ask(client, index, room)).data) for index in range(2)]

    assert asyncio.run(scenario()) == [b"\x00", b"\x01"]
    assert silences == [5.0, 10.0, 20.0, 40.0, 40.0, 80.0, 160.0, 320.0]


def test_a_publisher_of_another_run_hands_out_nothing(tmp_path: Path, keys: RunKeys) -> None:
    (tmp_path / "other").mkdir()
    others = RunKeys.create(tmp_path / "other")

    async def scenario() -> None:
        content = file_of(tmp_path / "file", 3 * CHUNK)
        async with serving(liar(content, tmp_path / "file", truncated, lies=0), others) as service:
            puller = puller_of(keys)
            pull = asyncio.create_task(puller.pull(content, tmp_path / "pulled", service.endpoint))
            await until(lambda: service.refusals.counts[PEERS] > 0)
            while not pull.done():
                move_time(PATIENCE_S)
                await asyncio.sleep(0.01)
            with pytest.raises(DeadlineError, match=rf"part-00003\.0\.7\.from-0\.6: .*{service.endpoint}"):
                await pull
            assert puller.bytes_in == 0

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(scenario())
    assert not (tmp_path / "pulled").exists()


def test_a_full_disk_is_one_line_and_no_file(tmp_path: Path, keys: RunKeys) -> None:
    async def scenario() -> None:
        content = file_of(tmp_path / "file", 5 * CHUNK)
        async with publisher(keys, content, tmp_path / "file") as (_, endpoint):
            with (
                limited_files(3 * CHUNK),
                pytest.raises(RunDirectoryError, match="pulled: cannot be written: ") as error,
            ):
                await puller_of(keys).pull(content, tmp_path / "pulled", endpoint)
            assert "\n" not in str(error.value)
            await puller_of(keys).pull(content, tmp_path / "pulled", endpoint)

    asyncio.run(scenario())
    assert (tmp_path / "pulled").read_bytes() == (tmp_path / "file").read_bytes()


def test_one_that_asks_and_never_reads_neither_fills_the_memory_nor_delays_another(
    tmp_path: Path, keys: RunKeys
) -> None:
    """What waits for it is counted when it reads at last: what was dropped is not there."""
    content, num_asked = file_of(tmp_path / "file", 64 * CHUNK), 1000
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.sndhwm, socket.rcvhwm, socket.rcvbuf = 0, 1, 1 << 16
    socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
    socket.curve_serverkey = keys.public.encode()

    def ask(number: int) -> None:
        request = wire.ChunkRequest(key=KEY, index=number % 64)
        socket.send_multipart([number.to_bytes(8, "big"), wire.encode(request)])

    def read_all() -> int:
        """How many answers were there before those to requests that are sent now."""
        num_read, last = 0, num_asked
        while True:
            ask(last)
            while socket.poll(100):
                number = int.from_bytes(socket.recv_multipart()[0], "big")
                if number >= num_asked:
                    return num_read
                num_read += number > 0  # 0 is a sign of life
            last += 1

    async def scenario() -> int:
        async with publisher(keys, content, tmp_path / "file") as (shelf, endpoint):
            socket.connect(endpoint)
            for number in range(1, num_asked):
                ask(number)
            await until(lambda: shelf.bytes_out >= (num_asked - 1) * CHUNK)
            await puller_of(keys).pull(content, tmp_path / "pulled", endpoint)
            return await asyncio.to_thread(read_all)

    try:
        assert asyncio.run(scenario()) < num_asked / 2  # the kernel's buffers take some
    finally:
        context.destroy(linger=0)
    assert (tmp_path / "pulled").read_bytes() == (tmp_path / "file").read_bytes()


def test_a_file_is_busy_for_a_while_after_each_chunk_that_is_asked_for(tmp_path: Path) -> None:
    content, clock = file_of(tmp_path / "file", CHUNK + 10), ManualClock()
    shelf = Shelf(clock)
    shelf.add(content, tmp_path / "file")
    assert shelf.busy() == set()
    shelf.chunk(wire.ChunkRequest(key=KEY, index=0))
    clock.now += BUSY_S - 1
    assert shelf.busy() == {KEY}
    clock.now += 1
    assert shelf.busy() == set()
    for index in range(2):
        shelf.chunk(wire.ChunkRequest(key=KEY, index=index))
    assert shelf.busy() == {KEY}
    clock.now += BUSY_AT_END_S
    assert shelf.busy() == set()
    shelf.close()


def test_a_wrong_request_is_refused_in_one_line(tmp_path: Path) -> None:
    content = file_of(tmp_path / "file", 10)
    shelf = Shelf()
    shelf.add(content, tmp_path / "file")
    with pytest.raises(RefusedError, match=r"found a request for chunk 1, expected less than 1"):
        shelf.chunk(wire.ChunkRequest(key=KEY, index=1))
    with pytest.raises(WeightsError, match="gone: cannot be read: No such file"):
        shelf.add(content, tmp_path / "gone")
    shelf.close()
    with pytest.raises(SluiceError):
        describe(KEY, tmp_path / "gone")
