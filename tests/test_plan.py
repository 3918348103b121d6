"""What a link costs, in arithmetic."""

import argparse
from pathlib import Path

import pytest
import torch

from lightning_entropy import plan
from lightning_entropy.strategies.exchange import Coupling, Links
from tests.strategies.runs import FORK_WARNINGS, external


def test_a_link_without_limit_costs_nothing() -> None:
    rows = plan.plan(1e8, 8, bandwidth=float("inf"), step=0.1)
    assert {row.utilisation for row in rows} == {1.0}


def test_streaming_dilocos_table_is_of_this_size() -> None:
    """Data parallel and DiLoCo of 1 B parameters at 1 Gbit/s (arXiv:2501.18512): 109 and about 0.9 hours."""
    rows = {(r.method, r.format): r for r in plan.plan(1e9, 2, bandwidth=1e9, step=0.2, inner_steps=[100])}
    assert rows["ddp", "float32"].utilisation < 0.01
    assert rows["DiLoCo, local SGD, H = 100", "int4"].utilisation > 0.8
    assert rows["Parle, Elastic-SGD, H = 100", "int4"].utilisation == 1.0
    sent = rows["DiLoCo, local SGD, H = 100", "int4"].bytes_per_step / rows["ddp", "float32"].bytes_per_step
    assert sent == pytest.approx(1 / 752, rel=0.01)


@pytest.mark.processes
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.filterwarnings(*FORK_WARNINGS)
def test_the_bytes_are_those_that_an_exchange_counts(tmp_path: Path, format: str) -> None:
    n = 1 << 18

    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        coupling = Coupling(Links(2, 1), format=format)  # type: ignore[arg-type]
        coupling([torch.randn(n)])()
        first = coupling.sent
        coupling([torch.randn(n)])()
        (tmp_path / str(rank)).write_text(str(coupling.sent - first))

    assert external(2, work) == ["", ""]
    expected, _ = plan.exchange(plan.bytes_per_weight(format) * n, 2, 1.0, 0.0)
    assert float((tmp_path / "0").read_text()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (plan.count, "124M", 124e6),
        (plan.count, "1.5B", 1.5e9),
        (plan.rate, "1Gbit", 1e9),
        (plan.rate, "100 Mbit/s", 1e8),
        (plan.duration, "0.4s", 0.4),
        (plan.duration, "20ms", 0.02),
    ],
)
def test_numbers_with_units(read: object, text: str, value: float) -> None:
    assert read(text) == pytest.approx(value)  # type: ignore[operator]


@pytest.mark.parametrize("read", [plan.count, plan.rate, plan.duration])
@pytest.mark.parametrize("text", ["fast", "", "12 apples", "1..2", "-3M"])
def test_what_is_no_number_is_said(read: object, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"must be a .*, got {text!r}"):
        read(text)  # type: ignore[operator]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--params", "124M", "--replicas", "4", "--link", "1Gbit", "--step", "0.4s", "--inner-steps", "25"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| ddp | float32 | 744 MB | 100.00% |")
    assert len(lines) == 2 + 1 + 2 * 4
    for wrong in (["--replicas", "1"], ["--inner-steps", "0"], ["--link", "0bit"]):
        with pytest.raises(SystemExit):
            plan.main(["--params", "124M", "--link", "1Gbit", "--step", "0.4s", *wrong])
    assert "--replicas must be >= 2, got 1" in capsys.readouterr().err
