"""A generator's own copy of the weights, in Hugging Face format on memory-backed storage: what its engine loads."""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import wire
from common.errors import ModelError, WeightsError
from common.files import one_line, write_atomically
from common.process import first_error
from common.rendezvous import RunKeys
from common.versions import Version
from common.weights.delta import Delta, apply_delta
from common.weights.parts import Part
from common.weights.pulling import AHEAD_SHARE, Puller
from common.weights.shelf import NUM_CONNECTIONS
from common.weights.work import num_threads, to_its_end

_INDEX = "model.safetensors.index.json"
_NUM_PULLED, _NUM_DECODED = 32, 4  # parts at a time


class Brought(NamedTuple):
    """What bringing a version took; parts are brought side by side.

    Attributes:
        transfer_s: Seconds that the slowest part was on the wire.
        decode_s: Seconds that the slowest part was decoded and checked.
        num_bytes: Bytes that came over the wire.
        num_whole: Parts that came whole.
    """

    transfer_s: float
    decode_s: float
    num_bytes: int
    num_whole: int


class _Held(NamedTuple):
    """A part that is there.

    Attributes:
        number: The part's number.
        version: Version of its tensors; None while it is changed.
    """

    number: int
    version: Version | None


class WeightsCopy:
    """Brought from version to version by pulling from all publishers; no engine may load it meanwhile.

    Deltas change its files in place; a whole part takes the place of the old one, which goes first. Beside the weights
    there is one delta of each part on its way, or those that come ahead of a whole one, and nothing else.

    Attributes:
        version: The version that it holds; None where it holds none, or parts of several.
        directory: In Hugging Face format while `version` is set.
    """

    def __init__(self, memory: Path, model: Path, keys: RunKeys, *, deadline_s: float) -> None:
        """`model` has the config that goes with the weights; `deadline_s` is how long a publisher may be silent.

        Raises:
            ModelError: The config cannot be read.
            RunDirectoryError: `memory` cannot be written.
        """
        self._puller = Puller(keys, deadline_s=deadline_s)
        self._held: dict[str, _Held | None] = {}  # by publisher
        self._pulling, self._decoding = asyncio.Semaphore(_NUM_PULLED), asyncio.Semaphore(_NUM_DECODED)
        self._is_indexed = False
        self.version: Version | None = None
        self.directory, self._pulled = memory / "weights", memory / "pulled"
        try:
            config = (model / "config.json").read_bytes()
        except OSError as error:
            raise ModelError(f"{model / 'config.json'}: cannot be read: {error.strerror}") from error
        with one_line(memory):
            self.directory.mkdir()
            self._pulled.mkdir()
            (self.directory / "config.json").write_bytes(config)

    async def bring(self, manifest: wire.Manifest) -> Brought:
        """Makes the copy a version. After an error it goes on from what is whole by then.

        Raises:
            RunDirectoryError: There is no room.
            RefusedError: A publisher no longer has the version.
            DeadlineError: A publisher is silent, or gets nowhere.
            WeightsError: What it hands out is damaged, or does not fit what is here.
        """
        self.version = None
        if self._held.keys() != set(manifest.publishers):  # another learner's: its deltas do not start from here
            for publisher in list(self._held):
                self._drop(publisher)
            self._remove_pulled("*")
            self._held, self._is_indexed = dict.fromkeys(manifest.publishers), False
        before = self._puller.bytes_in
        try:
            async with asyncio.TaskGroup() as tasks:
                parts = [tasks.create_task(self._bring_part(p, manifest.version)) for p in manifest.publishers]
        except BaseExceptionGroup as group:
            raise first_error(group) from group
        brought = [part.result() for part in parts]
        if not self._is_indexed:
            self._write_index()
            self._is_indexed = True
        self.version = manifest.version
        transfer_s = max((part.transfer_s for part in brought), default=0.0)
        decode_s = max((part.decode_s for part in brought), default=0.0)
        num_whole = sum(part.num_whole for part in brought)
        return Brought(transfer_s, decode_s, self._puller.bytes_in - before, num_whole)

    async def _bring_part(self, publisher: str, version: Version) -> Brought:
        async with self._pulling:
            held = self._held[publisher]
            answer = await self._puller.files(publisher, version, held.version if held else None)
            names = [str(content.key) for content in answer.files]
            self._remove_pulled(f"*part-{answer.part:05d}.*", but=names)
            transfer_s, decode_s, num_whole = 0.0, 0.0, 0
            ahead = _ahead(answer.files)
            for content in ahead:
                transfer_s += await self._pull(content, publisher)
            for content in answer.files:
                if content.key.base is None:
                    self._drop(publisher)
                    self._is_indexed, num_whole = False, num_whole + 1
                if content not in ahead:
                    transfer_s += await self._pull(content, publisher)
                async with self._decoding:
                    began = time.monotonic()
                    await self._take_in(publisher, content.key)
                    decode_s += time.monotonic() - began
            return Brought(transfer_s, decode_s, 0, num_whole)

    async def _pull(self, content: wire.Content, publisher: str) -> float:
        """Pulls a file; returns the seconds."""
        began = time.monotonic()
        num_connections = NUM_CONNECTIONS if len(self._held) <= _NUM_DECODED else 1
        path = self._pulled / str(content.key)
        await self._puller.pull(content, path, publisher, num_connections=num_connections)
        return time.monotonic() - began

    def _remove_pulled(self, pattern: str, *, but: Sequence[str] = ()) -> None:
        """Removes what pulls that were broken off have left, but for files that are still wanted."""
        for path in self._pulled.glob(pattern):
            if not any(name in path.name for name in but):
                path.unlink(missing_ok=True)

    async def _take_in(self, publisher: str, key: wire.FileKey) -> None:
        """Makes a part what a file says, in a thread, to its end: what is half changed is nothing.

        Raises:
            WeightsError: The file does not fit.
        """
        self._held[publisher] = _Held(key.part, None)
        try:
            await to_its_end(self._apply, publisher, key, self._pulled / str(key))
        except WeightsError as error:
            raise WeightsError(f"{error} (from {publisher})") from error

    def _apply(self, publisher: str, key: wire.FileKey, path: Path) -> None:
        if key.base is None:
            with one_line(path):
                path.rename(self._file(key.part))
        else:
            self._patch(key, path)
        self._held[publisher] = _Held(key.part, key.version)

    def _patch(self, key: wire.FileKey, path: Path) -> None:
        try:
            delta = Delta.open(path)
        finally:
            path.unlink()
        if (delta.base_version, delta.version) != (key.base, key.version):
            found = f"{delta.base_version} to {delta.version}"
            raise WeightsError(f"{path}: found a delta from {found}, expected {key.base} to {key.version}")
        with Part.open(self._file(key.part), writable=True) as part:
            apply_delta(part, delta, num_threads=max(1, num_threads() // min(len(self._held), _NUM_DECODED)))

    def _drop(self, publisher: str) -> None:
        """Makes room for a whole part."""
        if (held := self._held[publisher]) is not None:
            self._file(held.number).unlink(missing_ok=True)
        self._held[publisher] = None

    def _write_index(self) -> None:
        """Says which file has which tensor.

        Raises:
            WeightsError: Two parts have the same tensor.
        """
        where: dict[str, str] = {}
        total = 0
        for held in self._held.values():
            assert held is not None
            file = self._file(held.number)
            with Part.open(file) as part:
                if both := where.keys() & part.entries.keys():
                    raise WeightsError(f"{file}: found {min(both)} in {where[min(both)]}, too, expected it in one part")
                where |= dict.fromkeys(part.entries, file.name)
                total += part.size_bytes
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_atomically(self.directory / _INDEX, json.dumps(index).encode())

    def _file(self, number: int) -> Path:
        return self.directory / f"part-{number:05d}.safetensors"


def _ahead(files: Sequence[wire.Content]) -> list[wire.Content]:
    """Those of the files, a whole one and deltas on it, that are pulled before the whole one."""
    ahead: list[wire.Content] = []
    if files and files[0].key.base is None:
        room = AHEAD_SHARE * files[0].size_bytes
        for content in files[1:]:
            room -= content.size_bytes
            if room < 0:
                break
            ahead.append(content)
    return ahead
