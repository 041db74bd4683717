"""The estimate beside what a real update holds, on one rank."""

from pathlib import Path

import pytest

from tests.bench.memory import KINDS, RECOMPUTE, measure

TOLERANCE = 0.05


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_what_an_update_holds(kind: str, recompute: str, tmp_path: Path) -> None:
    measured, estimated = measure(tmp_path, kind, recompute)
    assert measured[:3] == estimated[:3]
    assert estimated.peak == pytest.approx(measured.peak, rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-moe"])
def test_the_estimate_holds_in_bfloat16(kind: str, tmp_path: Path) -> None:
    measured, estimated = measure(tmp_path, kind, "full", "bfloat16")
    assert measured[:3] == estimated[:3]
    assert estimated.peak == pytest.approx(measured.peak, rel=TOLERANCE)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_the_estimate_holds_where_layers_take_more_than_logits(recompute: str, tmp_path: Path) -> None:
    measured, estimated = measure(tmp_path, "qwen3", recompute, vocab_size=128)
    assert estimated.peak == pytest.approx(measured.peak, rel=TOLERANCE)
