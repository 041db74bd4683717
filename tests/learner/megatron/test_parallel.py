"""Every division over ranks trains as one process does in float64: loss, gradients, weights, all that is measured."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.learner.megatron import conformance, tiny
from tests.learner.megatron.conformance import Outcome

DIVISIONS: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    2: {
        "tp2": ("qwen3", {"tensor": 2}),
        "tp2-tied": ("qwen3-tied", {"tensor": 2}),
        "tp2-sp": ("qwen3", {"tensor": 2, "sequence": True}),
        "pp2": ("qwen3", {"pipeline": 2}),
        "pp2-tied": ("qwen3-tied", {"pipeline": 2}),
        "vpp2": ("qwen3", {"pipeline": 2, "virtual_pipeline": 2}),
        "cp2": ("qwen3", {"context": 2}),
        "dp2": ("qwen3", {"data": 2}),
        "moe-dp2": ("qwen3-moe", {"data": 2}),
        "moe-pp2": ("qwen3-moe", {"pipeline": 2}),
        "moe-vpp2": ("qwen3-moe", {"pipeline": 2, "virtual_pipeline": 2}),
        "moe-cp2": ("qwen3-moe", {"context": 2}),
        "moe-ep2": ("qwen3-moe", {"data": 2, "expert": 2}),
        "moe-etp2": ("qwen3-moe", {"tensor": 2, "sequence": True, "expert_tensor": 2}),
        "moe-tp2-ep2": ("qwen3-moe", {"tensor": 2, "sequence": True, "expert": 2}),
        "moe-cp2-ep2": ("qwen3-moe", {"context": 2, "expert": 2}),
    },
    4: {
        "tp2-sp-pp2": ("qwen3", {"tensor": 2, "sequence": True, "pipeline": 2}),
        "cp2-dp2": ("qwen3", {"context": 2, "data": 2}),
        "moe-pp2-ep2": ("qwen3-moe", {"pipeline": 2, "data": 2, "expert": 2}),
        "moe-tp2-dp2-ep2": ("qwen3-moe", {"tensor": 2, "sequence": True, "data": 2, "expert": 2}),
        "moe-dp2-cp2-ep2": ("qwen3-moe", {"context": 2, "data": 2, "expert": 2}),
    },
    8: {
        "moe-ep8": ("qwen3-moe", {"data": 8, "expert": 8}),
        "moe-dp2-ep4": ("qwen3-moe", {"data": 8, "expert": 4}),
    },
}
NAMES = [(size, name) for size, jobs in DIVISIONS.items() for name in jobs]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {kind: tiny.build(base / kind, kind, **options) for kind, options in conformance.MODELS.items()}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, Outcome]:
    return {kind: conformance.expected(model) for kind, model in models.items()}


@pytest.fixture(scope="module")
def outcomes(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    base = tmp_path_factory.mktemp("ranks")
    found: dict[str, Outcome] = {}
    for size, jobs in DIVISIONS.items():
        found |= conformance.run(models, jobs, base / str(size))
    return found


def test_the_step_is_as_hard_as_it_should_be(models: dict[str, Path], expected: dict[str, Outcome]) -> None:
    assert conformance.staleness_of(conformance.groups(models["qwen3"])) == set(range(9))
    for outcome in expected.values():
        metrics = outcome.metrics
        assert min(metrics["clip_fraction_low"], metrics["clip_fraction_high"]) > 0
        assert metrics["staleness_clip_fraction"] > 0
        assert metrics["grad_norm"] > 0.3
        assert metrics["num_masked"] == 1


@pytest.mark.parametrize(("size", "name"), NAMES)
def test_a_step_equals_the_reference(
    size: int, name: str, outcomes: dict[str, Outcome], expected: dict[str, Outcome], models: dict[str, Path]
) -> None:
    model = DIVISIONS[size][name][0]
    got, wanted = outcomes[name], expected[model]
    scale = conformance.mean_surrogate(models[model])
    assert abs(got.metrics["loss"] - wanted.metrics["loss"]) <= 1e-6 * scale
    _assert_gradients(got, wanted)
    _assert_weights(got, wanted)
    _assert_metrics(got, wanted)


def _assert_gradients(got: Outcome, wanted: Outcome) -> None:
    for tensor, gradient in got.gradients.items():
        reference = tiny.of_saved(wanted.gradients, tensor)
        assert float((gradient - reference).norm()) <= 2e-6 * float(reference.norm()), tensor


def _assert_weights(got: Outcome, wanted: Outcome) -> None:
    for tensor, weight in got.weights.items():
        reference = tiny.of_saved(wanted.weights, tensor)
        assert float((weight - reference).norm()) <= 2e-6 * float(reference.norm()), tensor


def _assert_metrics(got: Outcome, wanted: Outcome) -> None:
    assert got.metrics.keys() == wanted.metrics.keys()
    for metric, value in wanted.metrics.items():
        found = got.metrics[metric]
        if math.isnan(value):
            assert math.isnan(found), metric
        elif metric == "logprob_difference_p99":  # to the width of its bin
            assert found == pytest.approx(value, rel=0.02), metric
        else:
            assert found == pytest.approx(value, rel=1e-5, abs=1e-6), metric
