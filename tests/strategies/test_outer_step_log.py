"""What is logged at outer steps."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

import lightning_entropy as le
from tests.strategies.runs import FORK_WARNINGS, Net, fit, strategy

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_what_is_logged(tmp_path: Path, format: Any) -> None:
    fit(
        tmp_path,
        strategy(le.parle(4, le.Scoping(0.1, 0.5), 0.3), communication_dtype=format),
        2,
        logger=CSVLogger(tmp_path, "logs", "0"),
        log_every_n_steps=4,
        max_epochs=4,
    )
    lines = (tmp_path / "logs" / "0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    rows = [row for row in rows if row["entropy/outer_step"]]
    assert [int(row["step"]) for row in rows] == [3, 7, 11, 15, 19, 23, 27, 31]
    for t, row in enumerate(rows):
        assert float(row["entropy/gamma"]) == pytest.approx(0.1 * 1.5**t)
        assert float(row["entropy/rho"]) == 0.3
        assert float(row["entropy/effective_epochs"]) == (t + 1) / 2
        assert float(row["entropy/seconds_waited"]) > 0
    # The replicas start together; their distance is known a round later.
    spreads = [float(row["entropy/spread"]) for row in rows if row["entropy/spread"]]
    assert spreads[0] == 0
    assert all(0 < s < 1 for s in spreads[1:])
    weights = sum(p.numel() for p in Net().parameters())
    sent = float(rows[-1]["entropy/bytes_per_step"])
    # The weights are float64, which goes as it is; rounded, there is a block for each of the two.
    payload = {"float32": 8 * weights, "bfloat16": 2 * 2 * 1024, "int8": 2 * (1024 + 4)}[format]
    assert sent == pytest.approx((payload + 12) / 4)
    assert float(rows[-1]["entropy/peak_bytes"]) == payload + 12


def test_the_largest_exchange_is_of_the_largest_fragment(tmp_path: Path) -> None:
    """Of 35 + 7 + 21 + 3 weights in float64: the first tensor's, though all are sent in a loop."""
    logger = CSVLogger(tmp_path, "logs", "0")
    fit(tmp_path, strategy(le.streaming_diloco(4, 2, 1)), 2, logger=logger, log_every_n_steps=4)
    lines = (tmp_path / "logs" / "0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    rows = [row for row in rows if row["entropy/outer_step"]]
    assert [int(row["step"]) for row in rows] == [3, 7, 11, 15]
    for row in rows:
        assert float(row["entropy/peak_bytes"]) == 8 * 35 + 12
        assert float(row["entropy/bytes_per_step"]) == (8 * 66 + 2 * 12) / 4
        assert float(row["entropy/seconds_waited"]) > 0
    assert all(float(row["entropy/spread"]) > 0 for row in rows[1:])


@pytest.mark.parametrize(("every", "steps"), [(1, [3, 7, 11, 15]), (5, [7, 15]), (6, [7, 15]), (9, [11]), (0, [])])
def test_outer_steps_are_logged_at_most_every_so_many_steps(tmp_path: Path, every: int, steps: list[int]) -> None:
    logger = CSVLogger(tmp_path, "logs", "0")
    fit(tmp_path, strategy(le.parle(4, 0.1, 0.3)), 2, logger=logger, log_every_n_steps=every)
    file = tmp_path / "logs" / "0" / "metrics.csv"
    lines = file.read_text().splitlines() if file.exists() else [""]
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [int(row["step"]) for row in rows if row["entropy/outer_step"]] == steps
