"""Publishing: a version is announced when the parts of all ranks can be pulled, and a rank that fails is heard."""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from common import wire
from common.config import Config
from common.errors import DeadlineError, RunDirectoryError, WeightsError
from common.layout import read_resolved
from common.rendezvous import Rendezvous, RunKeys
from common.sections import RunConfig, WeightsConfig
from common.versions import Version
from generator.weights_copy import Brought, WeightsCopy
from learner.publish import Publisher
from learner.publisher.link import PublisherLink
from learner.ranks import Ranks
from learner.record import Stopwatch
from tests.clocks import PATIENCE_S
from tests.generator.sites import make_run
from tests.learner.test_checkpoints import limited_files
from tests.ranks import run_ranks

SIZE = 50_000


def weights(rank: int, number: int) -> dict[str, torch.Tensor]:
    """What a rank hands out of a version: a hundredth changes from one to the next."""
    generator = torch.Generator().manual_seed(rank)
    tensors = {f"{rank}.{name}": torch.randn(SIZE, generator=generator).bfloat16() for name in "ab"}
    for step in range(1, number + 1):
        for tensor in tensors.values():
            tensor[step::100] += 1
    return tensors


def logprobs(tokens: torch.Tensor) -> torch.Tensor:
    return -tokens.float()


class Rank:
    """One rank that publishes versions of its weights."""

    def __init__(self, run_dir: Path, config: Config | None = None) -> None:
        self.announced: list[wire.Manifest] = []
        self.ranks, self.watch = Ranks(), Stopwatch()
        self.publisher = Publisher(config or read_resolved(run_dir), run_dir, 64, self.ranks, self.announced.append)

    def publish(self, number: int) -> None:
        tensors = weights(self.ranks.rank, number)

        def export() -> Iterator[tuple[str, torch.Tensor]]:
            yield from tensors.items()

        self.publisher.publish(Version(0, number), export, logprobs, self.watch)

    def publish_first(self) -> PublisherLink:
        """Publishes a version and waits until it is announced; returns the link to the publisher of this rank."""
        self.publish(0)
        self.publisher.finish()
        assert self.publisher._link is not None
        return self.publisher._link


def make(directory: Path, memory: Path | None = None, host: str = "127.0.0.1", **run: Any) -> Path:
    """The directory of a run whose ledger is at `host`, and a place that stands for memory unless one is given."""
    for name in ("model", "memory"):
        (directory / name).mkdir(parents=True)
    (directory / "model" / "config.json").write_text("{}")
    sections = {"weights": WeightsConfig(dir=str(memory or directory / "memory")), "run": RunConfig(**run)}
    make_run(directory / "run", directory / "model", ["a"], **sections)
    Rendezvous(f"tcp://{host}:1", "", 0).write(directory / "run")
    return directory / "run"


def copy_in(directory: Path, run_dir: Path) -> WeightsCopy:
    directory.mkdir()
    return WeightsCopy(directory, run_dir.parent / "model", RunKeys.load(run_dir), deadline_s=PATIENCE_S)


def assert_has(copy: WeightsCopy, number: int, num_ranks: int) -> None:
    expected = {name: tensor for rank in range(num_ranks) for name, tensor in weights(rank, number).items()}
    found = {n: t for path in copy.directory.glob("*.safetensors") for n, t in load_file(path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_version_is_announced_once_the_parts_of_all_ranks_can_be_pulled(tmp_path: Path) -> None:
    make(tmp_path)
    run_ranks(2, tmp_path, publish_and_pull, tmp_path)
    assert list((tmp_path / "memory").iterdir()) == []


def publish_and_pull(directory: Path) -> None:
    """What each of two ranks does: both publish three versions, and the first one pulls them."""
    rank = Rank(directory / "run")
    copy = copy_in(directory / f"copy-{rank.ranks.rank}", directory / "run")
    brought: list[Brought] = []
    with closing(rank.publisher):
        for number in range(3):
            rank.publish(number)
            rank.publisher.finish()
            if rank.ranks.is_first:
                manifest = rank.announced[-1]
                assert (manifest.version, len(manifest.publishers)) == (Version(0, number), 2)
                assert manifest.size_bytes == 2 * 2 * 2 * SIZE
                tokens = torch.from_numpy(wire.ints(manifest.probe_token_ids).copy())
                assert wire.floats(manifest.probe_logprobs).tolist() == logprobs(tokens)[1:].tolist()
                brought.append(asyncio.run(copy.bring(manifest)))
                assert_has(copy, number, 2)
            dist.barrier()
        if rank.ranks.is_first:
            assert [b.num_whole for b in brought] == [2, 0, 0]
            assert [m.version.number for m in rank.announced] == [0, 1, 2]
            report = rank.publisher.report()
            assert report["changed_share"] == pytest.approx(0.01, rel=0.01)
            assert 0 < report["delta_share"] < 0.1
    parts = rank.watch.lap()
    assert {"snapshot_s", "export_s", "probe_s", "encode_wait_s"} <= parts.keys()


def test_a_rank_that_stops_encoding_is_named_and_its_version_stays_invisible(tmp_path: Path) -> None:
    make(tmp_path)
    run_ranks(2, tmp_path, _stop_encoding, tmp_path)


def _stop_encoding(directory: Path) -> None:
    rank = Rank(directory / "run")
    link = rank.publish_first()
    assert link._process is not None
    if rank.ranks.rank == 1:
        os.kill(link._process.pid, signal.SIGSTOP)
        link._deadline_s = 0.1
    rank.publish(1)
    with pytest.raises(WeightsError, match=r"waited 0\.1 s for the publisher of part 1 to encode version 0\.1$"):
        rank.publisher.finish()
    with pytest.raises(WeightsError, match=r"part 1 to encode version 0\.1$"):  # what the loop hears while it waits
        rank.publisher.check()
    assert [manifest.version.number for manifest in rank.announced] == [0] * rank.ranks.is_first
    if rank.ranks.rank == 1:
        os.kill(link._process.pid, signal.SIGCONT)
    rank.publisher.close()


def test_a_publisher_that_is_killed_while_it_encodes_is_told_again(tmp_path: Path) -> None:
    rank = Rank(make(tmp_path))
    with closing(rank.publisher):
        link = rank.publish_first()
        assert link._process is not None
        endpoint = link.endpoint
        os.kill(link._process.pid, signal.SIGSTOP)  # it does not get to what it is told now
        rank.publish(1)
        link._process.kill()
        rank.publisher.finish()
        assert [m.version.number for m in rank.announced] == [0, 1]
        assert rank.announced[-1].publishers == (endpoint,)
        copy = copy_in(tmp_path / "copy", tmp_path / "run")
        asyncio.run(copy.bring(rank.announced[-1]))
        assert_has(copy, 1, 1)


def test_all_ranks_hear_that_the_memory_of_one_is_full_and_nothing_is_left(tmp_path: Path) -> None:
    make(tmp_path)
    run_ranks(2, tmp_path, _publish_without_room, tmp_path)
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert told[0].startswith(str(tmp_path / "memory" / "sluice-learner-1-"))
    assert told[0].endswith("0.0.safetensors: cannot be written: File too large")
    assert list((tmp_path / "memory").iterdir()) == []


def _publish_without_room(directory: Path) -> None:
    rank = Rank(directory / "run")
    with closing(rank.publisher), limited_files(SIZE if rank.ranks.rank == 1 else 1 << 30):
        with pytest.raises(RunDirectoryError) as caught:
            rank.publish(0)
        (directory / f"told-{rank.ranks.rank}").write_text(str(caught.value))


def test_all_ranks_hear_that_one_gets_no_directory(tmp_path: Path) -> None:
    make(tmp_path)
    run_ranks(2, tmp_path, _begin_without_memory, tmp_path)
    assert list((tmp_path / "memory").iterdir()) == []


def _begin_without_memory(directory: Path) -> None:
    config = read_resolved(directory / "run")
    if dist.get_rank() == 1:
        config = msgspec.structs.replace(config, weights=WeightsConfig(dir=str(directory / "none")))
    with pytest.raises(RunDirectoryError, match=r"^weights\.dir: .*/none: cannot be written: No such file"):
        Rank(directory / "run", config)


def test_all_ranks_hear_that_the_publisher_of_one_does_not_start(tmp_path: Path) -> None:
    make(tmp_path)
    run_ranks(2, tmp_path, _publish_without_publisher, tmp_path)
    assert list((tmp_path / "memory").iterdir()) == []


def _publish_without_publisher(directory: Path) -> None:
    rank = Rank(directory / "run")
    if rank.ranks.rank == 1:
        sys.executable = str(directory / "no-python")
    message = r"^found the publisher of part 1 not started \(No such file or directory\), expected it to listen"
    with closing(rank.publisher), pytest.raises(WeightsError, match=message):
        rank.publish(0)


def test_what_a_library_prints_in_a_publisher_is_logged_and_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho a library was here\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    run_dir = make(tmp_path)
    monkeypatch.setattr(sys, "executable", str(python))
    rank = Rank(run_dir)
    with closing(rank.publisher):
        rank.publish_first()
    assert [manifest.version.number for manifest in rank.announced] == [0]
    assert "publisher_printed" in "".join(capfd.readouterr())


def test_a_publisher_that_never_listens_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 6000\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DeadlineError, match=r"waited 0\.1 s for the publisher of part 0 to listen"):
        PublisherLink(tmp_path, tmp_path, 0, deadline_s=0.1, max_restarts=3)
    assert not [process for process in psutil.Process().children() if process.name() == "sleep"]


def test_a_publisher_that_dies_too_often_ends_its_rank_in_one_line(tmp_path: Path) -> None:
    run_dir = make(tmp_path, max_restarts=0)
    rank = Rank(run_dir)
    with closing(rank.publisher):
        link = rank.publish_first()
        assert link._process is not None
        link._process.kill()
        rank.publish(1)
        with pytest.raises(WeightsError, match=r"found the publisher of part 0 dead 1 times, expected it to encode "):
            rank.publisher.finish()
    assert [manifest.version.number for manifest in rank.announced] == [0]


def test_a_rank_without_weights_publishes_nothing(tmp_path: Path) -> None:
    rank = Rank(make(tmp_path))
    with closing(rank.publisher):
        rank.publisher.publish(Version(0, 0), lambda: iter(()), logprobs, rank.watch)
        rank.publisher.finish()
    assert msgspec.structs.asdict(rank.announced[0])["publishers"] == ()
    assert rank.publisher._link is None
