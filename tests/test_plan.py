"""What a link costs, in arithmetic."""

import argparse
import ast
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_entropy as le
from lightning_entropy import plan
from lightning_entropy.strategies.exchange import Coupling, Links
from tests.strategies.runs import FORK_WARNINGS, Net, external, fit, strategy


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
    streaming = rows["Streaming DiLoCo, H = 100, P = 4, tau = 4", "int4"]
    assert streaming.peak == pytest.approx(rows["DiLoCo, local SGD, H = 100", "int4"].peak / 4)


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


class Wide(Net):
    """Four parts of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(*(torch.nn.Linear(1, 1 << 14, bias=False) for _ in range(4)))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return torch.stack([(p - 1).square().mean() for p in self.parameters()]).sum()


class Sent(L.Callback):
    """Write what the strategy has counted after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        own: Any = trainer.strategy
        self.found.append((own.bytes_sent, own._loops.peak()))

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        (self.folder / f"sent.{trainer.global_rank}").write_text(repr(self.found))


@pytest.mark.processes
@pytest.mark.parametrize("format", ["float32", "int4"])
@pytest.mark.parametrize(
    ("relaxation", "name"),
    [
        (le.diloco(6), "DiLoCo, local SGD, H = 6"),
        (le.streaming_diloco(6, 4, 2), "Streaming DiLoCo, H = 6, P = 4, tau = 2"),
        (le.elastic_sgd(6), "Parle, Elastic-SGD, H = 6"),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings(*FORK_WARNINGS)
def test_the_rows_are_what_replicas_count(tmp_path: Path, relaxation: le.Relaxation, name: str, format: Any) -> None:
    own = strategy(relaxation, communication_dtype=format)
    fit(tmp_path, own, 2, make=Wide, callbacks=[Sent(tmp_path)], max_steps=24, max_epochs=-1)
    rows = plan.plan(4 << 14, 2, bandwidth=1e9, step=1, inner_steps=[6], fragments=4, delay=2)
    row = next(row for row in rows if (row.method, row.format) == (name, format))
    for rank in range(2):
        sent = ast.literal_eval((tmp_path / f"sent.{rank}").read_text())
        loop = sent[17][0] - sent[11][0]
        # Beside the weights, 12 bytes an exchange.
        assert loop / 6 == pytest.approx(row.bytes_per_step, rel=3e-3)
        # Of anchors, differences alone are rounded: the first exchange is in float32.
        peak = 4 * (4 << 14) if relaxation.elastic_target == "anchor" else row.peak
        assert sent[17][1] == pytest.approx(peak, rel=3e-3)


def test_what_a_part_waits_for() -> None:
    """A second for each part, H = 12 of half a second, P = 3: 2 s from turn to turn."""

    def utilisation(delay: int, seconds: float) -> float:
        rows = plan.plan(3e6, 2, bandwidth=32e6 / seconds, step=0.5, inner_steps=[12], fragments=3, delay=delay)
        return next(row for row in rows if row.method.startswith("Streaming")).utilisation

    assert utilisation(0, 1.0) == pytest.approx(6 / 9)
    assert utilisation(1, 1.0) == pytest.approx(6 / 7.5)
    assert utilisation(2, 1.0) == 1.0
    # The link is never idle: what is sent in a loop takes 7.5 s of its 6, however long the delay.
    assert utilisation(4, 2.5) == utilisation(11, 2.5) == pytest.approx(6 / 7.5)


def test_from_which_bandwidth_on_nothing_waits() -> None:
    def found(bandwidth: float) -> dict[str, plan.Row]:
        return {r.method: r for r in plan.plan(1e6, 4, bandwidth=bandwidth, step=0.1, latency=0.01, inner_steps=[8])}

    rows = found(1e6)
    assert rows["DiLoCo, local SGD, H = 8"].bandwidth == float("inf")
    for name, row in rows.items():
        if row.bandwidth < float("inf"):
            assert found(1.0001 * row.bandwidth)[name].utilisation == 1.0
            assert found(0.99 * row.bandwidth)[name].utilisation < 1.0
    # Six messages of 10 ms are within the two steps of a part's turn, and not within two thirds of a step of 80 ms.
    late = plan.plan(1e6, 4, bandwidth=1e9, step=0.08, latency=0.01, inner_steps=[8])
    assert late[0].bandwidth == float("inf") and late[2].bandwidth < float("inf")
    assert not any(
        row.method.startswith("Streaming") for row in plan.plan(1e6, 2, bandwidth=1e9, step=1, inner_steps=[4])
    )


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
    head, table, verdict = capsys.readouterr().out.strip().split("\n\n")
    assert head.startswith(
        "4 replicas, each on a link of 1 Gbit/s with 0 ms a message; 124M weights; 0.4 s of computation"
    )
    assert "no wait from: the bandwidth from which on" in head
    # 744 MB are 5.952 s on the link, 0.267 s of them hidden: 0.4 / 6.085; in int8 a quarter, once in 25 steps.
    assert verdict.startswith(
        "ddp would use 6.6% of the time to compute; DiLoCo, local SGD, H = 25 in int8 87.0%; Parle"
    )
    assert "hardly waits" not in verdict
    lines = table.splitlines()
    assert lines[2].startswith("| ddp | float32 | 744 MB | 100.00% |")
    assert lines[2].endswith("| 744 MB | 22.3 Gbit/s |")
    assert lines[3].endswith("| 744 MB |  |")
    assert lines[4].startswith("| Streaming DiLoCo, H = 25, P = 4, tau = 4 | float32 | 29.8 MB | 4.00% | 100.0% |")
    assert len(lines) == 2 + 1 + 3 * 4
    plan.main(["--params", "1M", "--link", "10Gbit", "--step", "0.4s"])
    assert "ddp hardly waits here" in capsys.readouterr().out
    for wrong in (["--replicas", "1"], ["--inner-steps", "5", "0"], ["--link", "0bit"], ["--fragments", "0"]):
        with pytest.raises(SystemExit):
            plan.main(["--params", "124M", "--link", "1Gbit", "--step", "0.4s", *wrong])
    assert "--replicas must be >= 2, got 1" in capsys.readouterr().err
