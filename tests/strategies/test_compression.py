"""Sums rounded to bfloat16, int8 or int4."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_entropy as le
from lightning_entropy.strategies.compression import (
    BLOCK,
    BLOCK_4,
    CODECS,
    LEVELS,
    LEVELS_4,
    from_int4,
    from_int8,
    to_int4,
    to_int8,
)
from lightning_entropy.strategies.exchange import Coupling
from lightning_entropy.strategies.links import Links
from tests.strategies.runs import FORK_WARNINGS, fit, strategy
from tests.strategies.test_exchange import meet

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]


def test_int8() -> None:
    x = torch.randn(3, 4 * BLOCK)
    x[1, BLOCK : 2 * BLOCK] = 0
    packed, left = to_int8(x)
    sent = from_int8(packed, 4 * BLOCK)
    assert packed.shape == (3, 4 * BLOCK + 16)
    assert torch.equal(left, x - sent)
    largest = x.view(3, 4, BLOCK).abs().amax(-1, keepdim=True).expand(3, 4, BLOCK).reshape(3, -1)
    assert ((x - sent).abs() <= largest / LEVELS / 2 * 1.001).all()


def test_int4() -> None:
    x = torch.randn(3, 8 * BLOCK_4)
    x[1, BLOCK_4 : 2 * BLOCK_4] = 0
    packed, left = to_int4(x)
    sent = from_int4(packed, 8 * BLOCK_4)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 4 * BLOCK_4 + 8 * 4)
    assert torch.equal(left, x - sent)
    largest = x.view(3, 8, BLOCK_4).abs().amax(-1, keepdim=True).expand(3, 8, BLOCK_4).reshape(3, -1)
    assert ((x - sent).abs() <= largest / LEVELS_4 / 2 * 1.001).all()
    assert (sent[1, BLOCK_4 : 2 * BLOCK_4] == 0).all()


def test_int4_by_hand() -> None:
    """Steps of 2: the largest magnitude is 14. A byte is the first of a pair plus 8, and 16 times the second's."""
    x = torch.zeros(1, BLOCK_4)
    x[0, :6] = torch.tensor([14.0, -14.0, 2.9, 3.1, -0.9, 1.1])
    packed, left = to_int4(x)
    assert from_int4(packed, BLOCK_4)[0, :6].tolist() == [14, -14, 2, 4, 0, 2]
    torch.testing.assert_close(left[0, :6], torch.tensor([0.0, 0.0, 0.9, -0.9, -0.9, -0.9]))
    assert packed[0, :4].tolist() == [15 + 16 * 1, 9 + 16 * 10, 8 + 16 * 9, 8 + 16 * 8]
    assert packed[0, BLOCK_4 // 2 :].view(torch.float32).item() == 2


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_a_value_that_is_not_finite_stands_for_none_that_is(format: str, bad: float) -> None:
    encode, decode = CODECS[format]
    x = torch.randn(1, 2 * BLOCK)
    x[0, 3] = bad
    packed, left = encode(x)
    assert not decode(packed, 2 * BLOCK)[0, :BLOCK_4].isfinite().any()
    assert not left[0, :BLOCK_4].isfinite().any()
    assert decode(packed, 2 * BLOCK)[0, BLOCK:].isfinite().all()


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_what_is_representable_is_kept(format: str) -> None:
    encode, decode = CODECS[format]
    x = torch.randint(-7, 8, (2, BLOCK)).float() * 0.25
    x[:, ::BLOCK_4] = 7 * 0.25 if format != "int8" else 127 * 0.25
    packed, left = encode(x)
    assert not left.any() and torch.equal(decode(packed, BLOCK).float(), x)
    assert encode(x.double())[1].dtype == torch.float64


def literal(x: torch.Tensor, block: int, levels: int) -> tuple[list[int], list[float]]:
    """The steps and scales of one row, as the format is defined, number by number."""
    steps, scales = [], []
    for values in x[0].split(block):
        scales.append((values.abs().max() / levels).item())
        steps += [round((v / scales[-1]).item()) if scales[-1] > 0 else 0 for v in values]
    return steps, scales


@pytest.mark.parametrize("small", [1.0, 1e-30, 1e-36, 1e-43, 1e-45, 0.0])
def test_the_bytes_are_those_of_the_definition(small: float) -> None:
    x = torch.randn(1, 2 * BLOCK) * torch.tensor([1.0, small]).repeat_interleave(BLOCK)
    for encode, block, levels in ((to_int8, BLOCK, LEVELS), (to_int4, BLOCK_4, LEVELS_4)):
        steps, scales = literal(x, block, levels)
        numbers = torch.tensor(steps)
        if encode is to_int4:
            numbers = (numbers[::2] + 8) + 16 * (numbers[1::2] + 8)
        packed = encode(x)[0][0]
        assert torch.equal(packed[: len(numbers)], numbers.to(torch.uint8))
        assert torch.equal(packed[len(numbers) :].view(torch.float32), torch.tensor(scales))


@pytest.mark.processes
@pytest.mark.parametrize("length", [1, 1023, 2049, 3 * BLOCK])
def test_the_sum_of_representable_values_of_any_length_is_exact(tmp_path: Path, length: int) -> None:
    def work(rank: int) -> list[torch.Tensor]:
        coupling = Coupling(Links(2, 1), format="int4", differences=False)
        values = torch.arange(length).remainder(8).float().sub(0 if length == 1 else 1)
        values[::BLOCK_4] = 7.0
        return [coupling([values])()[0], values, torch.tensor(coupling.sent)]

    ranks = meet(2, work, tmp_path)
    for mean, values, sent in ranks:
        assert torch.equal(mean, values)
        # The header, and the values of both halves, padded to a whole block of each rank.
        padded = -(-length // (2 * BLOCK)) * 2 * BLOCK
        assert 0 < sent - padded * (0.5 + 4 / BLOCK_4) <= 64


@pytest.mark.processes
@pytest.mark.parametrize(("format", "most"), [("bfloat16", 2e-3), ("int8", 2e-3), ("int4", 2e-2)])
@pytest.mark.parametrize("n", [2, 3])
def test_compression_stays_near_the_exact_run(tmp_path: Path, format: Any, most: float, n: int) -> None:
    relaxation = le.elastic_sgd(2, 0.5)
    exact = fit(tmp_path / "exact", strategy(relaxation), n, max_epochs=4)
    near = fit(tmp_path / format, strategy(relaxation, communication_dtype=format), n, max_epochs=4)
    for left, right in zip(exact, near, strict=True):
        for x, y in zip(left["anchors"][-1], right["anchors"][-1], strict=True):
            assert 0 < (x - y).abs().max() < most
