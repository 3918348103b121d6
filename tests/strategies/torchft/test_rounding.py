"""What is sent with fewer bits by replicas that come and go."""

import pytest
import torch
from torch import Tensor

from lightning_entropy.strategies.compression import BLOCK, from_int8, to_int8
from lightning_entropy.strategies.torchft.rounding import Left, Rounding
from tests.strategies.torchft.meetings import Met, values

pytest.importorskip("torchft")

pytestmark = pytest.mark.processes


def literal(meetings: int) -> list[Tensor]:
    """Return the means of two replicas, written out: differences from the last mean, rounded twice with feedback."""
    mean = (values(0, 0) + values(1, 0)) / 2
    n, share = mean.numel(), 2 * BLOCK
    residuals, shares, means = [torch.zeros(n)] * 2, [torch.zeros(share)] * 2, []
    for t in range(1, meetings + 1):
        sent = []
        for r in range(2):
            v = values(r, t) - mean + residuals[r]
            packed, _ = to_int8(torch.nn.functional.pad(v, (0, 2 * share - n)).view(2, share))
            sent.append(from_int8(packed, share))
            residuals[r] = v - sent[r].view(-1)[:n]
        total = torch.empty(2, share)
        for r in range(2):
            v = sent[0][r] + sent[1][r] + shares[r]
            packed, _ = to_int8(v.view(1, share))
            total[r] = from_int8(packed, share)[0]
            shares[r] = v - total[r]
        mean = mean + total.view(-1)[:n] / 2
        means.append(mean)
    return means


def test_differences_from_the_last_mean_are_rounded_with_feedback(met: Met) -> None:
    result, _ = met("rounded")
    for got, expected in zip(result["two"], literal(4), strict=True):
        assert got[0] == got[1]
        torch.testing.assert_close(torch.tensor(got[0][0]), expected, rtol=0, atol=1e-6)
        exact = 0.5 * (values(0, 1) + values(1, 1))
    assert (torch.tensor(result["two"][0][0][0]) - exact).abs().max() > 1e-3  # it is rounded
    assert result["extra"] == 0.5  # and buffers are not
    # Padded to two blocks for each of two, with a scale a block; and 5 floats: a buffer, two counts, a distance.
    assert result["bytes"] == pytest.approx(4 * (4 * BLOCK + 4 * 4 + 4 * 4), abs=4 * 8)


def test_all_send_the_numbers_themselves_where_one_is_new(met: Met) -> None:
    result, _ = met("rounded")
    exact = sum(values(r, 5) for r in range(3)) / 3
    for means in result["third"]:
        torch.testing.assert_close(torch.tensor(means[0]), exact, rtol=0, atol=1e-6)
    exact = sum(values(r, 6) for r in range(3)) / 3
    for means in result["after"]:
        assert means == result["after"][0]
        assert 1e-3 < (torch.tensor(means[0]) - exact).abs().max() < 0.05


def test_pseudo_gradients_are_rounded_as_they_are_and_what_is_lost_comes_later(met: Met) -> None:
    result, _ = met("rounded_steps")
    exact = 0.5 * (values(0, 0) + values(1, 0))
    steps = torch.tensor(result["steps"])
    assert (steps[0] - exact).abs().max() > 0.1
    assert (steps.mean(0) - exact).abs().max() < 0.05


def test_another_format_is_refused(met: Met) -> None:
    result, _ = met("rounded_steps")
    assert result["said"][:2] == ["met", "met"]
    assert result["said"][2] == (
        "communication_dtype must be the same for all replicas, got 'bfloat16' in replica 2 and 'int4' in most others"
    )


class One:
    """A group of one process."""

    size = 1

    def all_reduce(self, values: Tensor) -> "One":
        return self

    def all_to_all(self, received: Tensor, given: Tensor) -> "One":
        received.copy_(given)
        return self

    def all_gather(self, received: list[Tensor], given: Tensor) -> "One":
        received[0].copy_(given)
        return self

    def wait(self) -> None: ...


def test_what_is_left_is_kept_by_one_that_does_not_count_and_a_share_by_its_place() -> None:
    left = Left(torch.ones(BLOCK), torch.full((BLOCK,), 0.5), (0, 1))
    lost = Rounding("int8", BLOCK, 0, None, left, lost=torch.tensor([True]))
    total, after = lost.sum(torch.full((BLOCK,), float("nan")), One(), 0, whole=False)
    torch.testing.assert_close(total, torch.full((BLOCK,), 0.5))  # zeros, and what its share has left over
    assert after.residual is left.residual
    moved = Rounding("int8", BLOCK, 0, None, left)
    total, after = moved.sum(torch.zeros(BLOCK), One(), 1, whole=False)
    torch.testing.assert_close(total, torch.ones(BLOCK))  # without the share, which was of other numbers
    assert after.place == (1, 1)
