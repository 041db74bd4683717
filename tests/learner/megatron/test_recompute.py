"""Computing activations anew changes what is kept, and nothing of what is learned."""

from pathlib import Path

import pytest
import torch

from learner.megatron.policy import Policy
from tests.learner.megatron import tiny

LENGTHS = [5, 9, 9, 12, 2, 30]


@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen3", "qwen3-moe"])
def test_every_recompute_gives_the_gradients_of_none(kind: str, tmp_path: Path) -> None:
    tiny.build(tmp_path, kind)
    expected, kept = _gradients(tmp_path, "none")
    for recompute in ("selective", "full"):
        gradients, fewer = _gradients(tmp_path, recompute)
        for name, gradient in gradients.items():
            wanted = expected[name]
            assert float((gradient - wanted).norm()) <= 1e-6 * float(wanted.norm()), (recompute, name)
        assert fewer < 0.8 * kept, recompute
        kept = fewer


def _gradients(path: Path, recompute: str) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of an update, and the bytes that its forward pass kept."""
    policy = Policy(tiny.config(path, learner={"recompute": recompute}))
    micros = tiny.micro_batches(LENGTHS)
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy._hidden(micros[0], policy._pieces[0])
    parameters = {parameter.untyped_storage().data_ptr() for parameter in policy._pieces[0].parameters()}
    kept = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)
    policy.update(micros, tiny.masked_mean_loss)
    return tiny.gradients(policy), kept
