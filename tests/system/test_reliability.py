"""The table of what faults cost."""

from pathlib import Path

import pytest

from tests.system.accounts import Cost
from tests.system.reliability import BEGIN, END, Table


def test_rows_are_written_between_the_markers_and_those_of_other_faults_stay(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\n{END}\n\nafter\n")
    first, second = Table(), Table()
    first.add("fire", "none", Cost(num_lost=0, num_doubled=0, recovery_s=1.26), "a")
    first.add("flood", "none", Cost(num_lost=0, num_doubled=0, recovery_s=None), "b")
    first.write(page)
    second.add("fire", "none", Cost(num_lost=0, num_doubled=0, recovery_s=7.0), "a")
    second.write(page)
    second.write(page)
    text = page.read_text()
    assert text.startswith(f"before\n\n{BEGIN}\n\n| fault | ")
    assert text.endswith(f"|\n\n{END}\n\nafter\n")
    rows = [line for line in text.splitlines() if line.startswith("| f") and "promised" not in line]
    assert [row.split(" | ")[:5] for row in rows] == [
        ["| fire", "none", "0", "0", "7.0"],
        ["| flood", "none", "0", "0", ""],
    ]


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="expected the table between them"):
        Table().write(page)
