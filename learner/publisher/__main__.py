"""One publisher: `python -m learner.publisher RUN DIRECTORY PART PORT`, started by its learner rank.

It reads which versions are written from stdin, and says on stdout where it listens and what it has encoded; it ends
with its learner rank.
"""

import argparse
import asyncio
import sys
from pathlib import Path

import msgspec

from common import wire
from common.config import Config
from common.errors import RefusedError, exit_on_error
from common.layout import read_resolved
from common.log import bind, logger, start_logging
from common.process import die_with_parent, run_until_stopped
from common.rendezvous import Rendezvous, RunKeys, address_towards
from common.versions import Version
from common.weights.shelf import Shelf, weights_service
from common.weights.work import num_threads
from learner.publisher.chain import Chain
from learner.publisher.reports import Encode, Encoded, Listening


def main() -> None:
    """Encodes and hands out until its learner rank ends."""
    parser = argparse.ArgumentParser(prog="python -m learner.publisher", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run directory that the launcher made")
    parser.add_argument("directory", type=Path, help="where the learner rank writes its parts")
    parser.add_argument("part", type=int, help="their number")
    parser.add_argument("port", type=int, help="to listen at; 0 takes a free one")
    arguments = parser.parse_args()
    die_with_parent()
    start_logging("publisher", arguments.run_dir, name=f"publisher-{arguments.part}")
    config, keys = read_resolved(arguments.run_dir), RunKeys.load(arguments.run_dir)
    host = address_towards(Rendezvous.read(arguments.run_dir).address)
    publisher = Publisher(config, arguments.directory, arguments.part)
    run_until_stopped(lambda stop: publisher.run(keys, host, arguments.port, stop))


class Publisher:
    """Hands out one part."""

    def __init__(self, config: Config, directory: Path, part: int) -> None:
        self._part = part
        self._chain = Chain(
            directory,
            part,
            anchor_every=config.weights.anchor_every,
            retention=config.weights.retention,
            num_threads=num_threads(),
        )
        self._shelf = Shelf()
        self._changed = asyncio.Condition()

    async def run(self, keys: RunKeys, host: str, port: int, stop: asyncio.Event) -> None:
        """Serves until `stop` is set or there is no more to read."""
        async with weights_service(self._handle, keys, host, port) as service, asyncio.TaskGroup() as tasks:
            _report(Listening(service.endpoint))
            working = (tasks.create_task(service.serve()), tasks.create_task(self._encode_all(stop)))
            await stop.wait()
            for task in working:
                task.cancel()

    async def _encode_all(self, stop: asyncio.Event) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        while line := await reader.readline():
            await self._encode(msgspec.json.decode(line, type=Encode))
        stop.set()

    async def _encode(self, order: Encode) -> None:
        new = await asyncio.to_thread(self._chain.encode, order.version, Path(order.path))
        for stored in self._chain.add(new, self._shelf.busy()):
            self._shelf.remove(stored.content.key)
        for stored in (new.whole, new.delta):
            if stored is not None:
                self._shelf.add(stored.content, stored.path)
        async with self._changed:
            self._changed.notify_all()
        bind(version=str(order.version))
        figures = {name: value for name, value in msgspec.structs.asdict(new.report).items() if name != "version"}
        logger().info("version_encoded", bytes_out=self._shelf.bytes_out, **figures)
        _report(new.report)

    async def _handle(self, peer: bytes, request: wire.Request) -> wire.Message:
        del peer
        match request:
            case wire.PartRequest():
                return await self._files(request.version, request.have)
            case wire.ChunkRequest():
                return self._shelf.chunk(request)
            case _:
                raise RefusedError(f"found {type(request).__name__}, expected a request for weights")

    async def _files(self, version: Version, have: Version | None) -> wire.PartFiles:
        async with self._changed:
            await self._changed.wait_for(lambda: self._chain.newest is not None and self._chain.newest >= version)
        files = tuple(stored.content for stored in self._chain.files(version, have))
        return wire.PartFiles(part=self._part, files=files)


def _report(report: Listening | Encoded) -> None:
    sys.stdout.write("\n" + msgspec.json.encode(report).decode() + "\n")  # ends what a library may have printed
    sys.stdout.flush()


if __name__ == "__main__":
    with exit_on_error():
        main()
