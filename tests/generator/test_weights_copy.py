"""A generator's copy of the weights, and publisher processes that it pulls from: whole and right, whoever dies."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from common import wire
from common.errors import ModelError, RefusedError, RunDirectoryError, WeightsError
from common.rendezvous import RunKeys
from common.sections import WeightsConfig
from common.versions import Version
from common.weights import pulling
from common.weights.delta import encode_delta
from common.weights.partial import describe
from common.weights.parts import Part
from common.weights.shelf import Shelf
from generator.weights_copy import Brought, WeightsCopy
from tests.clocks import PATIENCE_S
from tests.common.transferring import serving, until
from tests.generator.sites import make_run
from tests.learner.test_checkpoints import limited_files
from tests.publishing import Publishing, Tensors, changed, publishing, write_part

PARTS = (
    {"a": np.random.default_rng(0).normal(size=500_000).astype(np.float32), "b": np.arange(9_000, dtype=np.uint16)},
    {"c": np.ones((50, 700), np.float32)},
)
FULL_BYTES = sum(tensor.nbytes for part in PARTS for tensor in part.values())
V = [Version(0, number) for number in range(12)]


class Run(NamedTuple):
    """Publishers of two parts, and a copy that pulls from them.

    Attributes:
        publishing: The publishers.
        weights: The parts of each version.
        copy: The generator's.
    """

    publishing: Publishing
    weights: list[tuple[Tensors, ...]]
    copy: WeightsCopy

    def publish(self, *, share: float = 0.02) -> wire.Manifest:
        """Publishes the next version."""
        number = len(self.weights)
        new = tuple(changed(part, number, share=share) for part in self.weights[-1]) if number else PARTS
        self.weights.append(new)
        return self.publishing.publish(V[number], new)

    def bring(self, manifest: wire.Manifest) -> Brought:
        return asyncio.run(self.copy.bring(manifest))

    def is_right(self) -> bool:
        """Whether the copy has the version that it says, bit for bit, and nothing else."""
        assert self.copy.version is not None
        parts = self.weights[self.copy.version.number]
        expected = {name: tensor.tobytes() for part in parts for name, tensor in part.items()}
        found: dict[str, bytes] = {}
        for path in self.copy.directory.glob("*.safetensors"):
            with Part.open(path) as part:
                found |= {name: part.bytes(name).tobytes() for name in part.entries}
        return found == expected and not list(self.copy.directory.parent.glob("pulled/*"))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("memory", "published"):
        (tmp_path / name).mkdir()
    make_run(tmp_path / "run", tmp_path / "model", ["a"], weights=WeightsConfig(anchor_every=4, retention=2.2))
    copy = WeightsCopy(tmp_path / "memory", tmp_path / "model", RunKeys.load(tmp_path / "run"), deadline_s=PATIENCE_S)
    with publishing(tmp_path / "run", tmp_path / "published", num_parts=2) as publishers:
        yield Run(publishers, [], copy)


def test_a_joiner_takes_whole_parts_and_then_what_changed(run: Run) -> None:
    first = run.bring(run.publish())
    assert (first.num_whole, run.copy.version) == (2, V[0])
    assert run.is_right()
    assert first.num_bytes > FULL_BYTES
    second = run.bring(run.publish())
    assert (second.num_whole, run.copy.version) == (0, V[1])
    assert run.is_right()
    assert 0 < second.num_bytes < FULL_BYTES / 5
    assert min(second.transfer_s, second.decode_s) > 0
    index = (run.copy.directory / "model.safetensors.index.json").read_text()
    assert '"weight_map": {"a": "part-00000.safetensors"' in index


def test_versions_between_are_skipped_and_one_far_behind_takes_the_anchor_and_the_deltas_after_it(run: Run) -> None:
    run.bring(run.publish())
    for _ in range(3):
        newest = run.publish()
    skipped = run.bring(newest)
    assert (skipped.num_whole, run.copy.version) == (0, V[3])
    assert run.is_right()
    for _ in range(8):
        newest = run.publish(share=0.2)
    behind = run.bring(newest)
    assert (behind.num_whole, run.copy.version) == (2, V[11])
    assert run.is_right()


@pytest.mark.parametrize("wanted", [0, 2])
def test_a_pull_that_takes_as_long_as_many_versions_ends_with_the_version_that_it_is_of(
    run: Run, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is whole, or comes of a whole one and deltas that are gone before that one is through."""
    words = np.random.default_rng(1).integers(0, 60_000, 10_000_000, np.uint16)  # 20 chunks
    run.weights.append(({"d": words}, PARTS[1]))
    room, begun, ask = asyncio.Semaphore(8), set[int](), pulling._Transfer.ask

    async def by_version(transfer: Any, *args: Any) -> wire.Chunk:
        is_large = transfer.key.part == 0 and transfer.key.base is None
        if is_large:  # each version makes room for one more of its chunks
            await room.acquire()
        chunk = await ask(transfer, *args)
        if transfer.key.base is None:
            begun.add(transfer.key.part)
        return chunk

    def publish_next() -> wire.Manifest:
        number = len(run.weights)
        run.weights.append((changed(run.weights[-1][0], number, share=0.1), PARTS[1]))
        return run.publishing.publish(Version(0, number), run.weights[-1])

    async def bring(manifest: wire.Manifest) -> Brought:
        bringing = asyncio.create_task(run.copy.bring(manifest))
        await until(lambda: begun == {0, 1})
        while not bringing.done():
            await asyncio.to_thread(publish_next)
            room.release()
        return bringing.result()

    monkeypatch.setattr(pulling._Transfer, "ask", by_version)
    newest = [run.publishing.publish(V[0], run.weights[0]), *(publish_next() for _ in range(wanted))][-1]
    assert asyncio.run(bring(newest)).num_whole == 2
    assert len(run.weights) > 12  # an anchor is there for six or less
    assert run.copy.version == V[wanted]
    assert run.is_right()


def test_whoever_asks_for_a_version_that_is_gone_is_refused_and_goes_on_with_the_newest(run: Run) -> None:
    old = run.publish()
    for _ in range(9):
        newest = run.publish(share=0.2)
    with pytest.raises(
        RefusedError, match=r"refused PartRequest: part [01]: found version 0\.9 published, expected 0\.0"
    ):
        run.bring(old)
    assert run.copy.version is None
    run.bring(newest)
    assert run.is_right()


def test_a_publisher_that_is_killed_is_started_again_and_hands_its_newest_version_out_whole(run: Run) -> None:
    run.bring(run.publish())
    newest = run.publish()
    process = run.publishing.links[0]._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    brought = run.bring(newest)
    assert (brought.num_whole, run.copy.version) == (1, V[1])
    assert run.is_right()
    run.bring(run.publish())
    assert run.is_right()


def test_a_pull_that_is_broken_off_at_any_moment_goes_on_with_what_is_whole(run: Run) -> None:
    async def broken_off(manifest: wire.Manifest, num_turns: int) -> bool:
        bringing = asyncio.create_task(run.copy.bring(manifest))
        for _ in range(num_turns):
            await asyncio.sleep(0.001)
        bringing.cancel()
        await asyncio.wait({bringing})
        return bringing.cancelled()

    moments: set[bool] = set()
    for number in range(10):
        newest = run.publish()
        moments.add(asyncio.run(broken_off(newest, 4 * number)))
        run.bring(newest)
        assert run.is_right()
    assert True in moments


def test_what_a_pull_that_was_broken_off_has_left_goes_with_the_next(run: Run) -> None:
    old = run.publish()
    pulled = run.copy.directory.parent / "pulled"
    for name in (".part-00000.0.0.whole.partial", "part-00000.0.7.from-0.6", ".part-00001.0.9.whole.partial"):
        (pulled / name).write_bytes(b"left")
    run.bring(old)
    assert run.is_right()


def test_another_learners_publishers_make_it_begin_anew(run: Run, tmp_path: Path) -> None:
    run.bring(run.publish())
    with publishing(tmp_path / "run", tmp_path / "resumed", num_parts=1) as others:
        again = {**PARTS[0], **PARTS[1]}
        manifest = others.publish(Version(1, 0), [again])
        assert run.bring(manifest).num_whole == 1
    assert [path.name for path in run.copy.directory.glob("*.safetensors")] == ["part-00000.safetensors"]
    run.weights[0] = (again,)
    run.copy.version = V[0]
    assert run.is_right()


def test_a_copy_that_is_not_what_it_should_be_is_found_by_the_tensors_and_pulled_whole(run: Run) -> None:
    run.bring(run.publish())
    with (run.copy.directory / "part-00000.safetensors").open("rb+") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"x")
    newest = run.publish()
    message = (
        r"part-00000.*: version 0\.1: tensor [ab]: found checksum \w+, expected \w+ \(from tcp://127\.0\.0\.1:\d+\)$"
    )
    with pytest.raises(WeightsError, match=message):
        run.bring(newest)
    assert run.copy.version is None
    assert run.bring(newest).num_whole == 1
    assert run.is_right()


def test_no_room_for_a_part_is_one_line(run: Run) -> None:
    newest = run.publish()
    with (
        limited_files(1_000_000),
        pytest.raises(RunDirectoryError, match=r"pulled/part-00000.* cannot be written: ") as error,
    ):
        run.bring(newest)
    assert "\n" not in str(error.value)
    run.bring(newest)
    assert run.is_right()


def test_a_model_without_a_config_is_one_line(tmp_path: Path, keys: RunKeys) -> None:
    with pytest.raises(ModelError, match=r"none/config\.json: cannot be read: No such file or directory$"):
        WeightsCopy(tmp_path, tmp_path / "none", keys, deadline_s=PATIENCE_S)


def test_two_parts_with_the_same_tensor_are_refused(run: Run) -> None:
    manifest = run.publishing.publish(V[0], (PARTS[0], PARTS[0]))
    for _ in range(2):  # at the second try everything is there already
        with pytest.raises(WeightsError, match=r"found a in part-0000\d\.safetensors, too, expected it in one part"):
            run.bring(manifest)
    assert run.copy.version is None


def test_what_a_publisher_says_must_lead_from_what_is_here_to_what_is_asked(tmp_path: Path, keys: RunKeys) -> None:
    """A publisher that names files of other versions, and one whose delta is not what its name says."""
    base, new = (write_part(tmp_path / name, part) for name, part in (("0", PARTS[1]), ("1", changed(PARTS[1], 1))))
    delta = tmp_path / "delta"
    with Part.open(base) as old, Part.open(new) as now:
        encode_delta(old, now, delta, base_version=V[3], version=V[4])
    whole, step = wire.FileKey(0, V[0], None), wire.FileKey(0, V[1], V[0])
    contents = {whole: describe(whole, base), step: describe(step, delta)}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "memory").mkdir()

    named: list[wire.FileKey] = []

    async def scenario() -> None:
        shelf = Shelf()
        for key, path in ((whole, base), (step, delta)):
            shelf.add(contents[key], path)

        async def handle(peer: bytes, request: wire.Request) -> wire.Message:
            del peer
            if isinstance(request, wire.ChunkRequest):
                return shelf.chunk(request)
            assert isinstance(request, wire.PartRequest)
            return wire.PartFiles(part=0, files=tuple(contents[key] for key in named))

        async with serving(handle, keys) as service:
            probe = {"probe_token_ids": b"", "probe_logprobs": b""}
            manifests = [wire.Manifest(version=v, publishers=(service.endpoint,), size_bytes=1, **probe) for v in V[:2]]
            copy = WeightsCopy(tmp_path / "memory", tmp_path / "model", keys, deadline_s=PATIENCE_S)
            for wrong in ([step], []):
                named[:] = wrong
                with pytest.raises(
                    WeightsError, match=r"part 0 from tcp://.*: found files from .* to .*, expected such"
                ):
                    await copy.bring(manifests[0])
            named[:] = [whole]
            await copy.bring(manifests[0])
            named[:] = [step]
            with pytest.raises(
                WeightsError, match=r"found a delta from 0\.3 to 0\.4, expected 0\.0 to 0\.1 \(from tcp:"
            ):
                await copy.bring(manifests[1])
            shelf.close()

    asyncio.run(scenario())
