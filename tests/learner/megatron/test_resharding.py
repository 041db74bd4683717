"""Checkpoints and Hugging Face weights on several ranks: any division reads what any other wrote."""

import resource
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from common import wire
from common.config import Config
from common.errors import RunDirectoryError
from common.layout import write_resolved
from common.learning import LossConfig
from common.rendezvous import RunKeys
from common.versions import Lineages, Version
from learner.checkpoints import Checkpoints
from learner.export import export_checkpoint
from learner.ranks import Ranks
from learner.sharded import write
from learner.shared import NO_COMMIT
from learner.step import train_step
from tests.learner.megatron import conformance, tiny
from tests.learner.saves import mark_saved
from tests.ranks import run_ranks

Division = dict[str, Any]
Groups = tuple[wire.TrainingGroup, ...]
CHAINS: dict[str, list[tuple[str, Division]]] = {
    "qwen3-moe": [
        ("dp2-ep2", {"data": 2, "expert": 2}),
        ("tp2-ep2", {"tensor": 2, "sequence": True, "expert": 2}),
        ("dp4-ep4", {"data": 4, "expert": 4}),
    ],
    "qwen3": [("pp2", {"pipeline": 2}), ("dp2", {"data": 2}), ("tp2-pp2", {"tensor": 2, "pipeline": 2})],
    "qwen3-tied": [("vpp2", {"pipeline": 2, "virtual_pipeline": 2}), ("pp2", {"pipeline": 2}), ("dp4", {"data": 4})],
}
SPLIT: dict[str, Division] = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "ep2": {"data": 2, "expert": 2},
    "etp2": {"tensor": 2, "sequence": True, "expert_tensor": 2},
    "tp2-ep2": {"tensor": 2, "sequence": True, "expert": 2},
}
DENSE, EXPERTS = ("qwen2", "qwen2-tied", "qwen3", "qwen3-tied"), ("qwen3-moe", "qwen3-moe-tied")
IN_AND_OUT = [(kind, split) for kind in DENSE for split in ("tp2", "pp2")]
IN_AND_OUT += [(kind, split) for kind in EXPERTS for split in SPLIT if split != "tp2"]
LINKS = [(kind, link) for kind, chain in CHAINS.items() for link in (1, 2) if chain[link]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of two spawns leave: one of two ranks, then one of four that goes on from its checkpoints."""
    base = tmp_path_factory.mktemp("resharding")
    for kind, options in conformance.MODELS.items():
        tiny.build(base / kind, kind, **options)
    for kind in DENSE + EXPERTS:
        sizes = {"vocab_size": 64} | ({"moe_intermediate_size": 32} if kind in EXPERTS else {})
        tiny.build(base / "whole" / kind, kind, dtype=torch.bfloat16, **sizes)
    groups = conformance.groups(base / "qwen3")
    run_ranks(2, base, _two_ranks, base, groups)
    run_ranks(4, base, _four_ranks, base, groups)
    return base


@pytest.mark.parametrize("kind", CHAINS)
def test_the_same_division_goes_on_bit_for_bit(kind: str, base: Path) -> None:
    assert _difference(base / kind, "whole-1", "again-1") == 0


@pytest.mark.parametrize(("kind", "link"), LINKS)
def test_another_division_holds_the_same_weights_and_goes_on_from_them(kind: str, link: int, base: Path) -> None:
    assert _difference(base / kind, f"saved-{link}", f"loaded-{link}") == 0
    assert _difference(base / kind, f"whole-{link}", f"saved-{link}") > 1e-3, "the step was none"
    assert _difference(base / kind, f"whole-{link}", f"went-on-{link}") <= 2e-6


@pytest.mark.parametrize(("kind", "split"), IN_AND_OUT)
def test_what_ranks_hand_out_is_what_they_read_bit_for_bit(kind: str, split: str, base: Path) -> None:
    original = load_file(base / "whole" / kind / "model.safetensors")
    handed_out = _together(base / "whole" / kind, split)
    assert handed_out.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in handed_out.items())


@pytest.mark.parametrize(("kind", "split"), IN_AND_OUT)
def test_ranks_take_turns_in_handing_out(kind: str, split: str, base: Path) -> None:
    """Within one layer's weights, which a rank of a pipeline may have more of than the other."""
    parts = [torch.load(path) for path in (base / "whole" / kind).glob(f"{split}.rank-*.pt")]
    num_bytes = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
    assert len(parts) == 2
    assert max(num_bytes) <= 2 / 3 * sum(num_bytes)


@pytest.mark.parametrize(("kind", "split"), IN_AND_OUT)
def test_an_export_of_what_ranks_saved_is_what_they_handed_out(kind: str, split: str, base: Path) -> None:
    directory = base / "whole" / kind
    write_resolved(_config(directory, {}, dtype="bfloat16"), directory)
    export_checkpoint(directory / "checkpoints" / split, directory / f"exported-{split}")
    exported = load_file(directory / f"exported-{split}" / "model.safetensors")
    handed_out = _together(directory, f"trained-{split}")
    assert exported.keys() == handed_out.keys()
    assert all(torch.equal(tensor, handed_out[name]) for name, tensor in exported.items())
    began = load_file(directory / "model.safetensors")
    assert any(not torch.equal(tensor, began[name]) for name, tensor in exported.items())


def test_ranks_save_beside_training_and_commit_together(base: Path) -> None:
    told = [msgspec.json.decode((base / f"told-{rank}").read_bytes()) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0]["before"] == [False, False]
    assert told[0]["after"] == ["step-000001"]
    assert "cannot be written" in told[0]["error"]
    assert told[0]["left"] == ["step-000001"]


def _two_ranks(base: Path, groups: Groups) -> None:
    _groups.extend(groups)
    for kind, chain in CHAINS.items():
        _first(base / kind, chain[0][1])
        _next(base / kind, chain[1][1], 1)
    for kind, split in IN_AND_OUT:
        _in_and_out(base / "whole" / kind, split)
    _beside_training(base)


def _four_ranks(base: Path, groups: Groups) -> None:
    _groups.extend(groups)
    for kind, chain in CHAINS.items():
        _next(base / kind, chain[2][1], 2)


def _first(model: Path, division: Division) -> None:
    """Two steps, a checkpoint, and two more that go on without an interruption; then the first of those again."""
    policy = _policy(model, division)
    _step(policy, model, division, 0)
    _step(policy, model, division, 1)
    write(model / "checkpoint-1", policy.snapshot(), dist.group.WORLD)
    _keep(policy, model, "saved-1")
    for link in (1, 2):
        _step(policy, model, division, 1 + link)
        _keep(policy, model, f"whole-{link}")
    policy = _policy(model, division)
    _step(policy, model, division, 7)
    policy.load(model / "checkpoint-1")
    _step(policy, model, division, 2)
    _keep(policy, model, "again-1")


def _next(model: Path, division: Division, link: int) -> None:
    """On another division: the checkpoint of the one before, a step, and the next checkpoint."""
    policy = _policy(model, division)
    policy.load(model / f"checkpoint-{link}")
    _keep(policy, model, f"loaded-{link}")
    _step(policy, model, division, 1 + link)
    _keep(policy, model, f"went-on-{link}")
    _keep(policy, model, f"saved-{link + 1}")
    write(model / f"checkpoint-{link + 1}", policy.snapshot(), dist.group.WORLD)


def _in_and_out(directory: Path, split: str) -> None:
    policy = _policy(directory, SPLIT[split], dtype="bfloat16")
    _keep(policy, directory, split)
    _step(policy, directory, SPLIT[split], 0)
    _keep(policy, directory, f"trained-{split}")
    checkpoint = directory / "checkpoints" / split
    write(checkpoint / "megatron", policy.snapshot(), dist.group.WORLD)
    if dist.get_rank() == 0:
        mark_saved(checkpoint, Version(0, 1))


def _beside_training(base: Path) -> None:
    """A save that rank 1 is late for, and one that it fails in: both ranks tell the same."""
    rank, ranks = dist.get_rank(), Ranks()
    if ranks.is_first:
        RunKeys.create(base)
    dist.barrier()
    division = {"data": 2}
    policy = _policy(base / "qwen3", division)
    checkpoints = Checkpoints(_config(base / "qwen3", division), base, ranks)
    checkpoints.save(policy, Version(0, 1), NO_COMMIT)
    before = [bool(list((base / "checkpoints").glob("step-*"))) for _ in range(2)]
    _step(policy, base / "qwen3", division, 0)
    assert (checkpoints.look() or checkpoints.finish()) is not None
    after = [path.name for path in (base / "checkpoints").iterdir()]
    dist.barrier()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    error = ""
    try:
        checkpoints.save(policy, Version(0, 2), NO_COMMIT)
        checkpoints.finish()
    except RunDirectoryError as caught:
        error = str(caught)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    left = [path.name for path in (base / "checkpoints").iterdir()]
    told = {"before": before, "after": after, "error": error, "left": left}
    (base / f"told-{rank}").write_bytes(msgspec.json.encode(told))


def _config(model: Path, division: Division, dtype: str = "float32") -> Config:
    """As the conformance tests, with a loss that keeps its gradient however far the weights have moved."""
    config, replace = conformance.config(model, **division), msgspec.structs.replace
    learner = replace(config.learner, dtype=dtype)
    return replace(config, learner=learner, loss=LossConfig(staleness_clip=1e9))


def _policy(model: Path, division: Division, dtype: str = "float32") -> Any:
    from learner.megatron.policy import Policy

    return Policy(_config(model, division, dtype))


def _step(policy: Any, model: Path, division: Division, number: int) -> None:
    """One of several steps on the same groups, in an order of its own."""
    settings = _config(model, division)
    metrics = train_step(policy, tuple(_groups), settings, Version(0, 8 + number), Lineages(), Ranks().gather)
    assert metrics["grad_norm"] > 0.3


_groups: list[wire.TrainingGroup] = []  # what every step of a rank trains on


def _keep(policy: Any, directory: Path, name: str) -> None:
    """This rank's weights, in a file."""
    weights = {weight: tensor.clone() for weight, tensor in policy.export()}
    torch.save(weights, directory / f"{name}.rank-{dist.get_rank()}.pt")


def _together(directory: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights of all ranks."""
    whole: dict[str, torch.Tensor] = {}
    for path in directory.glob(f"{name}.rank-*.pt"):
        part = torch.load(path)
        assert whole.keys().isdisjoint(part)
        whole |= part
    return whole


def _difference(directory: Path, a: str, b: str) -> float:
    """The largest of any tensor, relative to its norm."""
    first, second = _together(directory, a), _together(directory, b)
    assert first.keys() == second.keys()
    return max(float((tensor - second[name]).norm() / tensor.norm()) for name, tensor in first.items())
