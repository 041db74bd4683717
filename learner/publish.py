"""Publishing a version: what of it is on the step's critical path, and what goes on beside training."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from common import wire
from common.config import Config
from common.errors import DeadlineError, RunDirectoryError, SluiceError, WeightsError
from common.memory import MemoryDirectory
from common.versions import Version
from learner.publisher.link import PublisherLink
from learner.publisher.reports import Encoded
from learner.ranks import Ranks
from learner.record import Stopwatch
from learner.snapshot import PartWriter

PROBE_TOKENS = 64
_END_S = 10.0
Export = Callable[[], Iterator[tuple[str, torch.Tensor]]]


class _Ready(msgspec.Struct, frozen=True):
    """What a rank says of its part.

    Attributes:
        endpoint: Where the part can be pulled; empty where the rank has none.
        encoded: What encoding it came to.
        error: Why it is not encoded; empty where it is.
    """

    endpoint: str = ""
    encoded: Encoded | None = None
    error: str = ""


class Publisher:
    """Writes each version as one part a rank; a process beside the rank encodes it and hands it out.

    A version is announced when the parts of all ranks are encoded, by a thread of the first rank; training goes on
    meanwhile, up to the next version. Generators pull: nobody waits for them.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        vocab_size: int,
        ranks: Ranks,
        announce: Callable[[wire.Manifest], None],
    ) -> None:
        """`announce` is called on the first rank, in another thread. All ranks make all calls in the same order.

        Raises:
            RunDirectoryError: The memory-backed storage of a rank cannot be written, as all ranks hear.
        """
        self._run_dir, self._ranks, self._announce = run_dir, ranks, announce
        self._deadline_s, self._max_restarts = config.run.stall_timeout_s, config.run.max_restarts
        self._directory, self._writer = _memory_of(ranks, Path(config.weights.dir)), PartWriter()
        self._group = ranks.new_group()
        self._link: PublisherLink | None = None
        self._version = Version(0, 0)
        self._announced: Future[None] | None = None
        self._encoded: list[Encoded] = []
        generator = torch.Generator().manual_seed(config.seed)
        self._probe = torch.randint(0, vocab_size, (PROBE_TOKENS,), generator=generator).int()

    def publish(
        self, version: Version, export: Export, logprobs: Callable[[torch.Tensor], torch.Tensor], watch: Stopwatch
    ) -> None:
        """Writes one version; it is announced when it can be pulled. The policy may be trained on when this returns.

        Args:
            version: The version of the weights.
            export: The policy's weights that this rank hands out.
            logprobs: The policy's logprobs of a token sequence, Int[T] -> Float[T], the first one without meaning.
            watch: Takes the times: `encode_wait` for the version before, `snapshot` for the copy, of which `export` is
                what makes the tensors, and `probe` for the logprobs.

        Raises:
            RunDirectoryError: The memory-backed storage of a rank is full, as all ranks hear.
            DeadlineError: A rank does not say in time whether it has encoded the version before, or the publisher of
                one does not start in time.
            WeightsError: The part of a rank cannot be encoded, or its publisher does not start, as all ranks hear.
        """
        with watch("encode_wait"):
            self.finish()
        with watch("snapshot"):
            path = self._directory.path / f"{version}.safetensors"
            self._ranks.raise_together(self._write(path, lambda: watch.each("export", export())))
        if self._link is not None:
            self._link.encode(version, path)
        with watch("probe"):
            probed = logprobs(self._probe)[1:].float().cpu().numpy()
        self._version, self._announced = version, (announced := Future[None]())
        arguments = (announced, version, probed)
        Thread(target=self._announce_encoded, args=arguments, name="announce", daemon=True).start()

    def finish(self) -> None:
        """Waits until the newest version is announced.

        Raises:
            DeadlineError: A rank does not say in time whether its part is encoded.
            WeightsError: The part of a rank cannot be encoded, as all ranks hear.
        """
        if self._announced is not None:
            try:
                self._announced.result(self._deadline_s)
            except TimeoutError as error:
                waited = (
                    f"waited {self._deadline_s:g} s for all {self._ranks.size} ranks to encode version {self._version}"
                )
                raise DeadlineError(waited) from error

    def check(self) -> None:
        """Looks whether the newest version can still be announced, and does not wait.

        Raises:
            WeightsError: The part of a rank cannot be encoded, as all ranks hear.
        """
        if self._announced is not None and self._announced.done():
            self._announced.result()

    def report(self) -> dict[str, float]:
        """What encoding the newest announced version took and came to, for the first rank; NaN where there is no delta.

        Seconds are those of the slowest rank, shares those of all parts together.
        """
        parts = self._encoded
        deltas = [part for part in parts if part.delta_bytes]
        full, elements = sum(part.full_bytes for part in parts), sum(part.num_elements for part in parts)
        whole = len(deltas) == len(parts) > 0
        return {
            "encode_s": max((part.seconds for part in parts), default=math.nan),
            "delta_share": sum(part.delta_bytes for part in deltas) / full if whole else math.nan,
            "changed_share": sum(part.num_changed for part in deltas) / elements if whole else math.nan,
        }

    def close(self) -> None:
        """Removes everything published: nobody pulls from a learner that has ended."""
        if self._announced is not None:
            wait([self._announced], _END_S)
        if self._link is not None:
            self._link.close()
        self._directory.remove()

    def _write(self, path: Path, export: Export) -> SluiceError | None:
        """Writes the part, and starts its publisher where there is none; returns what failed."""
        try:
            self._writer.write(export, path)
            if self._writer.size_bytes and self._link is None:
                self._link = PublisherLink(
                    self._run_dir,
                    self._directory.path,
                    self._ranks.rank,
                    deadline_s=self._deadline_s,
                    max_restarts=self._max_restarts,
                )
        except (RunDirectoryError, DeadlineError, WeightsError) as error:
            return error
        return None

    def _announce_encoded(self, announced: Future[None], version: Version, probed: NDArray[np.float32]) -> None:
        try:
            self._await_all(version, probed)
            announced.set_result(None)
        except (SluiceError, RuntimeError) as error:  # RuntimeError: gloo's, where another rank has died
            announced.set_exception(error)
        finally:
            if not announced.done():  # a defect, whose traceback the thread prints
                announced.set_exception(WeightsError(f"version {version} was not announced: the error is above"))

    def _await_all(self, version: Version, probed: NDArray[np.float32]) -> None:
        """Announces a version once all ranks have encoded their parts.

        Raises:
            WeightsError: One cannot, or not in time.
        """
        own = _Ready()
        if self._link is not None:
            try:
                own = _Ready(self._link.endpoint, self._link.await_encoded())
            except (DeadlineError, WeightsError) as error:
                own = _Ready(error=str(error))
        told = self._ranks.gather(msgspec.msgpack.encode(own), self._group)
        ready = [msgspec.msgpack.decode(data, type=_Ready) for data in told]
        if error := next((rank.error for rank in ready if rank.error), ""):
            raise WeightsError(error)
        if not self._ranks.is_first:
            return
        self._encoded = [rank.encoded for rank in ready if rank.encoded is not None]
        self._announce(
            wire.Manifest(
                version=version,
                publishers=tuple(rank.endpoint for rank in ready if rank.endpoint),
                size_bytes=sum(part.full_bytes for part in self._encoded),
                probe_token_ids=wire.int_bytes(self._probe.numpy()),
                probe_logprobs=wire.float_bytes(probed),
            )
        )


def _memory_of(ranks: Ranks, parent: Path) -> MemoryDirectory:
    """A directory of this rank.

    Raises:
        RunDirectoryError: A rank gets none, as all ranks hear.
    """
    try:
        directory = MemoryDirectory.make(parent, f"learner-{ranks.rank}")
    except RunDirectoryError as error:
        ranks.raise_together(error)
        raise
    try:
        ranks.raise_together(None)
    except RunDirectoryError:
        directory.remove()
        raise
    return directory
