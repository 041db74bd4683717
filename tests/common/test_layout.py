"""What a layout and its overrides come to."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from common.layout import load_config, read_resolved, write_resolved


def layout(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "layout.toml"
    path.write_text(text)
    return path


def test_a_section_that_gives_one_key_keeps_its_own_defaults_of_the_rest(tmp_path: Path) -> None:
    """Evaluation is greedy by default; a limit of its length must not make it sample."""
    config = load_config(layout(tmp_path, "[evaluation.sampling]\nmax_tokens = 8\n"), [])
    assert (config.evaluation.sampling.max_tokens, config.evaluation.sampling.temperature) == (8, 0.0)
    assert config.sampling.temperature == 1.0


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_number_that_json_cannot_hold_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"loss\.staleness_clip: found {value}, expected a finite number"):
        load_config(layout(tmp_path, ""), [f"loss.staleness_clip={value}"])


def test_the_resolved_configuration_is_read_back_as_it_was(tmp_path: Path) -> None:
    config = load_config(layout(tmp_path, "steps = 7\n"), ["optimizer.lr=3e-6", "sampling.stop=['x']"])
    write_resolved(config, tmp_path)
    assert read_resolved(tmp_path) == config
