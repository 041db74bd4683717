"""Checkpoints that are not what was written: found out whatever it is, passed over, set aside, and told of."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import torch
import torch.distributed as dist

from common.config import Config
from common.errors import DamageError, RunDirectoryError
from common.rendezvous import RunKeys
from common.versions import Version
from learner.checkpoints import Checkpoints
from learner.ranks import Ranks
from learner.sharded import State, read
from learner.sums import check_files, sums_of
from tests.learner.saves import Weights, commit, flip_a_bit, make_config, names, saved
from tests.ranks import run_ranks

DATA, METADATA = "megatron/__0_0.distcp", "megatron/.metadata"


def replaced(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing file": (lambda c: (c / DATA).unlink(), r"__0_0.distcp: cannot be read: No such file"),
    "a file cut short": (
        lambda c: os.truncate(c / DATA, 1000),
        r"__0_0.distcp: found 1000 bytes, expected the \d+ that",
    ),
    "an empty file": (lambda c: os.truncate(c / DATA, 0), r"__0_0.distcp: found 0 bytes"),
    "a longer file": (lambda c: (c / DATA).open("ab").write(b"\0"), r"__0_0.distcp: found \d+ bytes, expected"),
    "a flipped bit in a tensor": (
        lambda c: flip_a_bit(c / DATA),
        r"__0_0.distcp: found checksum [0-9a-f]{8}, expected",
    ),
    "a flipped bit in the index": (lambda c: flip_a_bit(c / METADATA), r".metadata: found checksum"),
    "no index": (lambda c: (c / METADATA).unlink(), r".metadata: cannot be read: No such file"),
    "no files": (lambda c: shutil.rmtree(c / "megatron"), r"cannot be read: No such file"),
    "a file in place of the files": (
        lambda c: (shutil.rmtree(c / "megatron"), (c / "megatron").touch()),
        r"cannot be read: Not a directory",
    ),
    "no version.json": (lambda c: (c / "version.json").unlink(), r"found no version.json, expected a whole checkpoint"),
    "an empty version.json": (lambda c: os.truncate(c / "version.json", 0), r"version.json: found no version"),
    "another digit in version.json": (
        lambda c: replaced(c / "version.json", b'"sequence":2', b'"sequence":3'),
        r"version.json: found checksum",
    ),
    "other letters in version.json": (
        lambda c: replaced(c / "version.json", b"sequence", b"sequenze"),
        r"version.json: found no version, sequence and run in it",
    ),
    "no text in version.json": (
        lambda c: replaced(c / "version.json", b"sequence", b"\xff\xfe\x00sequ"),
        r"version.json: found no version",
    ),
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    RunKeys.create(tmp_path)
    return make_config(tmp_path)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_set_aside_and_told_of(kind: str, config: Config, tmp_path: Path) -> None:
    saved(Checkpoints(config, tmp_path, Ranks()), 1, 2)
    damage, expected = DAMAGE[kind]
    damage(tmp_path / "checkpoints" / "step-000002")
    checkpoints, policy = Checkpoints(config, tmp_path, Ranks()), Weights()
    point = checkpoints.load_newest(policy)
    assert point is not None
    assert (point.version, point.commit) == (Version(0, 1), commit(1))
    assert float(policy.values["value.0"][0]) == 1
    assert names(tmp_path) == ["step-000001", "step-000002"], "nothing is renamed before the ledger has agreed"
    with structlog.testing.capture_logs() as events:
        checkpoints.fallback.set_aside()
    assert names(tmp_path) == ["damaged-step-000002", "step-000001"]
    (event,) = events
    assert re.search(expected, event["damage"]), event["damage"]
    assert {key: event[key] for key in ("event", "checkpoint", "instead", "kept_as")} == {
        "event": "checkpoint_damaged",
        "checkpoint": "step-000002",
        "instead": "step-000001",
        "kept_as": "damaged-step-000002",
    }
    saved(checkpoints, 2, 3)
    assert names(tmp_path) == ["damaged-step-000002", "step-000002", "step-000003"]


def test_of_what_is_set_aside_the_newest_two_are_kept(config: Config, tmp_path: Path) -> None:
    for first in (1, 4, 7):
        saved(Checkpoints(config, tmp_path, Ranks()), first, first + 1, first + 2)
        flip_a_bit(tmp_path / "checkpoints" / f"step-{first + 2:06d}" / DATA)
        checkpoints = Checkpoints(config, tmp_path, Ranks())
        assert checkpoints.load_newest(Weights()) is not None
        checkpoints.fallback.set_aside()
    assert names(tmp_path) == ["damaged-step-000006", "damaged-step-000009", "step-000008"]


def test_the_link_to_the_best_goes_where_that_is_damaged(config: Config, tmp_path: Path) -> None:
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    saved(checkpoints, 1, 2)
    checkpoints.mark_best(Version(0, 2), 0.7)
    flip_a_bit(tmp_path / "checkpoints" / "step-000002" / DATA)
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    checkpoints.load_newest(Weights())
    checkpoints.fallback.set_aside()
    assert names(tmp_path) == ["damaged-step-000002", "step-000001"]
    checkpoints.mark_best(Version(0, 1), 0.1)
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-000001"


def test_where_none_is_whole_a_refusal_of_the_ledger_names_the_damage_and_everything_stays(
    config: Config, tmp_path: Path
) -> None:
    saved(Checkpoints(config, tmp_path, Ranks()), 1, 2)
    for name in names(tmp_path):
        flip_a_bit(tmp_path / "checkpoints" / name / DATA)
    checkpoints = Checkpoints(config, tmp_path, Ranks())
    assert checkpoints.load_newest(Weights()) is None
    expected = (
        r"checkpoints: found damage in step-000002, step-000001 \(.*step-000002/megatron/__0_0.distcp: found .*: no"
    )
    with pytest.raises(RunDirectoryError, match=expected), checkpoints.fallback.naming_damage():
        raise RunDirectoryError("no")
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_file_that_may_not_be_read_is_no_damage(config: Config, tmp_path: Path) -> None:
    """Else a wrong mount or mode would have whole checkpoints set aside. A link to itself stands for both."""
    saved(Checkpoints(config, tmp_path, Ranks()), 1, 2)
    for name in (DATA, "version.json"):
        path = tmp_path / "checkpoints" / "step-000002" / name
        kept = path.rename(path.with_suffix(".kept"))
        path.symlink_to(path.name)
        with pytest.raises(RunDirectoryError, match="cannot be read: Too many levels of symbolic links") as caught:
            Checkpoints(config, tmp_path, Ranks()).load_newest(Weights())
        assert not isinstance(caught.value, DamageError)
        kept.replace(path)
    assert Checkpoints(config, tmp_path, Ranks()).load_newest(Weights()) is not None


class Parts:
    """A policy of which each rank has a tensor; the first one's is the largest."""

    def __init__(self, value: float) -> None:
        rank = dist.get_rank()
        self.own = {f"value.{rank}": torch.full((1 << (16 - rank),), value)}

    def snapshot(self) -> State:
        return {name: tensor.clone() for name, tensor in self.own.items()}

    def load(self, path: Path) -> None:
        read(path, self.own, dist.group.WORLD)

    def export(self) -> Any:
        raise AssertionError


def test_all_ranks_agree_where_one_alone_sees_the_damage(tmp_path: Path) -> None:
    RunKeys.create(tmp_path)
    run_ranks(2, tmp_path, _find_damage, tmp_path)
    told = [msgspec.json.decode((tmp_path / f"told-{rank}").read_bytes()) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0]["files"] == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert "__1_0.distcp: found checksum" in told[0]["damage"]
    assert (told[0]["number"], told[0]["value"]) == (1, 1)
    assert names(tmp_path) == ["damaged-step-000002", "step-000001"]


def _find_damage(directory: Path) -> None:
    rank, ranks, config = dist.get_rank(), Ranks(), make_config(directory)
    checkpoints = Checkpoints(config, directory, ranks)
    for number in (1, 2):
        checkpoints.save(Parts(number), Version(0, number), commit(number))
        checkpoints.finish()
    files = directory / "checkpoints" / "step-000002" / "megatron"
    sums = sums_of(files.iterdir())
    dist.barrier()
    assert sorted(sums, key=lambda name: -sums[name].size_bytes)[1] == "__1_0.distcp", "the second rank's to check"
    if rank == 0:
        flip_a_bit(files / "__1_0.distcp")
    dist.barrier()
    damage = ""
    try:
        check_files(files, sums, ranks)
    except DamageError as error:
        damage = str(error)
    checkpoints, policy = Checkpoints(config, directory, ranks), Parts(0)
    point = checkpoints.load_newest(policy)
    assert point is not None
    checkpoints.fallback.set_aside()
    value = float(policy.own[f"value.{rank}"][0])
    told = {"files": sorted(point.files), "damage": damage, "number": point.version.number, "value": value}
    (directory / f"told-{rank}").write_bytes(msgspec.json.encode(told))
