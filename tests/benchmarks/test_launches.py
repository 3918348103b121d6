"""The counts of calls: the command prints the tables that docs/benchmarks.md has."""

import re
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).parents[2]


@pytest.mark.processes
@pytest.mark.slow
def test_the_tables_of_ten_tensors() -> None:
    done = forked.run("benchmarks.launches", "--small")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 tensors; SGD with momentum itself makes ")
    rows = [
        line.strip("| ").split(" | ") for line in done.stdout.splitlines() if re.match(r"\| (`|float32|bfl|int)", line)
    ]
    assert len(rows) == 23
    found = [int(cell) for row in rows for cell in row[1:] if cell.strip("| ")]
    assert len(found) == 86 and min(found) > 0 and max(found) <= 40
    # The page names the same rows; its counts are of one version of torch.
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert all(f"| {row[0]} | " in page for row in rows)
