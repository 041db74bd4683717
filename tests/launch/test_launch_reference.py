"""docs/configuration.md."""

from pathlib import Path
from typing import Any

import msgspec

from common.config import Config
from launch.reference import reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def paths(values: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in values.items():
        path = f"{prefix}{name}"
        found |= paths(value, f"{path}.") if isinstance(value, dict) and value else {path}
    return found


def test_the_page_of_all_keys_is_what_the_code_says() -> None:
    assert PAGE.read_text() == reference(), "run: python -m launch.reference > docs/configuration.md"


def test_no_key_is_left_out_and_each_is_described() -> None:
    lines = PAGE.read_text().splitlines()
    for path in paths(msgspec.to_builtins(Config())):
        row = next((line for line in lines if line.startswith(f"| `{path}` |")), "")
        assert row.rstrip("| ").rpartition("| ")[2], path
