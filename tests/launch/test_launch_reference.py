"""docs/configuration.md."""

from pathlib import Path

from launch.reference import reference


def test_the_page_of_all_keys_is_what_the_code_says() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
    assert page.read_text() == reference(), "run: python -m launch.reference > docs/configuration.md"
