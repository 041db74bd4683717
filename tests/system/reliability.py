"""The table of docs/reliability.md, from what the tests of faults saw."""

import time
from pathlib import Path

from tests.system.accounts import Cost

BEGIN, END = "<!-- table: make test-full ONLY=faults -->", "<!-- end of the table -->"
_HEAD = (
    "| fault | what is promised | lost | doubled | seconds to recover | test | seen on |",
    "|---|---|---|---|---|---|---|",
)


class Table:
    """Rows by fault."""

    def __init__(self) -> None:
        self._rows: dict[str, str] = {}

    def add(self, fault: str, promise: str, seen: Cost, test: str) -> None:
        """Takes down what was seen of a fault."""
        recovery = "" if seen.recovery_s is None else f"{seen.recovery_s:.1f}"
        cells = (fault, promise, str(seen.num_lost), str(seen.num_doubled), recovery, test, time.strftime("%Y-%m-%d"))
        self._rows[fault] = f"| {' | '.join(cells)} |"

    def write(self, page: Path) -> None:
        """Puts the rows between the page's markers; rows of faults that were not tried now stay as they are.

        Raises:
            ValueError: The page has no markers.
        """
        before, begin, rest = page.read_text().partition(BEGIN)
        old, end, after = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"{page}: found no {BEGIN} and {END}, expected the table between them")
        lines = [line for line in old.splitlines() if line.startswith("| ") and line != _HEAD[0]]
        rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines} | self._rows
        page.write_text("\n".join([before + BEGIN, "", *_HEAD, *rows.values(), "", END + after]))
