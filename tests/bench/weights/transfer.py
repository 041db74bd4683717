"""`python -m tests.bench weights.transfer`: a version from a publisher to copies of generators, processes of their own.

A bfloat16 model of 1 GiB, whole and then what one Adam-like update at 1e-6 changes; over loopback under CURVE, into
memory-backed files. Seconds are from the order to encode to the last copy that is whole and checked. Memory is the peak
of a process's own pages and of the files in its directory together, seen every 10 ms. The first two figures are what
the machine takes for the same bytes without any of this.
"""

import asyncio
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec
import zmq

from common import wire
from common.rendezvous import RunKeys
from common.versions import Version
from common.weights.parts import Part
from generator.weights_copy import Brought, WeightsCopy
from tests.bench.report import Figure
from tests.bench.weights.synthetic import SHAPES, Model
from tests.generator.sites import make_run
from tests.publishing import Publishing, publishing

MIB = 1 << 20
NUM_PULLERS = (1, 4)
UPDATES, RATE = 1, 1e-6
PATIENCE_S = 600.0


class Told(msgspec.Struct, frozen=True):
    """What a puller says of a version: what it took, when it was there, and its peak memory so far."""

    brought: Brought
    ended: float
    peak_bytes: int


def run() -> list[Figure]:
    """To each number of pullers, whole and as a delta."""
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory, model = Path(name), Model((UPDATES,))
        versions = [model.write(directory / f"v{n}", SHAPES, n, RATE, "BF16") for n in (0, UPDATES)]
        full_bytes = versions[0].size_bytes
        figures += _alone(directory / "alone", full_bytes)
        for num_pullers in NUM_PULLERS:
            figures += _figures(num_pullers, full_bytes, *_measure(directory / str(num_pullers), versions, num_pullers))
    return figures


def _alone(path: Path, full_bytes: int) -> list[Figure]:
    chunk, num_chunks = os.urandom(wire.CHUNK_BYTES), full_bytes // wire.CHUNK_BYTES
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(num_chunks):
            file.write(chunk)
    written = time.perf_counter() - began
    path.unlink()
    keys = zmq.curve_keypair()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool, zmq.Context() as context:
        socket = context.socket(zmq.PULL)
        socket.rcvhwm, socket.curve_server = 16, True
        socket.curve_publickey, socket.curve_secretkey = keys
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        sending = pool.submit(_send, keys, port, chunk, num_chunks + 1)
        socket.recv()
        began = time.perf_counter()
        for _ in range(num_chunks):
            socket.recv(copy=False)
        sent = time.perf_counter() - began
        sending.result()
        socket.close()
    return [
        Figure("the same bytes into a new memory-backed file, alone", written, "s"),
        Figure("the same bytes over a CURVE connection, alone", sent, "s"),
    ]


def _send(keys: tuple[bytes, bytes], port: int, chunk: bytes, num_chunks: int) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.sndhwm, socket.curve_serverkey = 16, keys[0]
        socket.curve_publickey, socket.curve_secretkey = keys
        socket.connect(f"tcp://127.0.0.1:{port}")
        for _ in range(num_chunks):
            socket.send(chunk, copy=False)


def _figures(
    num_pullers: int, full_bytes: int, seconds: list[float], told: list[list[Told]], publisher_bytes: int
) -> list[Figure]:
    figures: list[Figure] = []
    for kind, took, pullers in zip(("whole", "delta"), seconds, told, strict=True):
        name = f"{kind} to {num_pullers} puller{'s' * (num_pullers > 1)}"
        pulled = sum(puller.brought.num_bytes for puller in pullers)
        slowest = max(pullers, key=lambda puller: puller.brought.transfer_s).brought
        figures += [
            Figure(f"{name}: encoded, pulled and checked by all", took, "s"),
            Figure(f"{name}: transfer of the slowest", slowest.transfer_s, "s"),
            Figure(f"{name}: decoding of the slowest", max(puller.brought.decode_s for puller in pullers), "s"),
            Figure(f"{name}: the learner's bytes", pulled / MIB, "MiB"),
            Figure(f"{name}: bytes a puller", 100 * pulled / num_pullers / full_bytes, "% of full"),
        ]
    most = max(puller.peak_bytes for puller in told[-1])
    name = f"{num_pullers} puller{'s' * (num_pullers > 1)}"
    return [
        *figures,
        Figure(f"{name}: of whole, the delta takes", seconds[1] / seconds[0], "x"),
        Figure(f"{name}: memory of a puller, at most", most / full_bytes, "x the model", f"{most / MIB:,.0f} MiB"),
        Figure(f"{name}: memory of the publisher with its files", publisher_bytes / full_bytes, "x the model"),
    ]


def _measure(directory: Path, versions: list[Part], num_pullers: int) -> tuple[list[float], list[list[Told]], int]:
    """Seconds and what the pullers say of each version, and the publisher's peak."""
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "config.json").write_text("{}")
    make_run(directory / "run", directory / "model", ["a"])
    seconds: list[float] = []
    told: list[list[Told]] = []
    with publishing(directory / "run", directory / "published") as publisher, ExitStack() as stack:
        pullers = [stack.enter_context(_puller(directory, number)) for number in range(num_pullers)]
        memory = _Memory(publisher_id(publisher), directory / "published")
        for number, part in enumerate(versions):
            version = Version(0, number)
            path = directory / "published" / "00000" / f"{version}.safetensors"
            shutil.copyfile(part.path, path)  # as the learner's snapshot
            began = time.time()
            publisher.links[0].encode(version, path)
            publisher.links[0].await_encoded()
            manifest = publisher.manifest(version)
            for puller in pullers:
                _write(puller, msgspec.json.encode(manifest).decode())
            told.append([msgspec.json.decode(_line(puller), type=Told) for puller in pullers])
            seconds.append(max(puller.ended for puller in told[-1]) - began)
        return seconds, told, memory.peak_bytes


def publisher_id(publisher: Publishing) -> int:
    """The process that hands out."""
    process = publisher.links[0]._process
    assert process is not None
    return process.pid


@contextmanager
def _puller(directory: Path, number: int) -> Generator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "tests.bench.weights.transfer", str(directory), str(number)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert _line(process) == "ready"
        yield process
    finally:
        process.kill()
        process.wait()


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _write(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


class _Memory:
    """The peak of a process's own pages together with what is in a directory."""

    def __init__(self, process_id: int, directory: Path) -> None:
        self.peak_bytes = 0
        self._process_id, self._directory = process_id, directory
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            try:
                status = Path(f"/proc/{self._process_id}/status").read_text()
            except FileNotFoundError:
                return
            own = next((line for line in status.splitlines() if line.startswith("RssAnon")), "")
            size_bytes = 1024 * int(own.split()[1]) if own else 0  # a process that has ended has none
            self.peak_bytes = max(self.peak_bytes, size_bytes + _size_of(self._directory))
            time.sleep(0.01)


def _size_of(directory: Path) -> int:
    """Bytes that its files take; one that is renamed meanwhile counts once."""
    sizes: dict[int, int] = {}
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            status = path.stat()
            sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def _pull(directory: Path, number: str) -> None:
    """What a puller does: brings each version that it hears of on stdin."""
    own = directory / f"copy-{number}"
    own.mkdir()
    memory = _Memory(os.getpid(), own)
    copy = WeightsCopy(own, directory / "model", RunKeys.load(directory / "run"), deadline_s=PATIENCE_S)
    _say("ready")
    for line in sys.stdin:
        brought = asyncio.run(copy.bring(msgspec.json.decode(line, type=wire.Manifest)))
        _say(msgspec.json.encode(Told(brought, time.time(), memory.peak_bytes)).decode())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _pull(Path(sys.argv[1]), sys.argv[2])
