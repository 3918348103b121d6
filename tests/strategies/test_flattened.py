"""Many tensors as one line of numbers, and back; and what is asked of the line."""

import pytest
import torch
from torch import Tensor

from lightning_entropy.strategies.flattened import finite, flatten, squared_distance, unflatten
from tests.strategies.test_exchange import values


def assorted() -> list[Tensor]:
    some = [*values(3), torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last), torch.randn(5, 7).T]
    return [*some, torch.empty(0, 3), torch.randn(6).to(torch.bfloat16), torch.arange(3)]


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_one_line_has_all_values_in_the_order_of_their_indices(wide: torch.dtype) -> None:
    tensors = [t.to(wide) if t.dtype == torch.float32 else t for t in assorted()]
    flat = flatten(tensors)
    assert flat.dtype == wide
    assert torch.equal(flat, torch.cat([t.to(wide).reshape(-1) for t in tensors]))
    for back, t in zip(unflatten(flat, tensors), tensors, strict=True):
        assert torch.equal(back, t.to(wide))
    assert flatten([]).shape == (0,) and unflatten(flatten([]), []) == []


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_which_parts_are_finite(bad: float) -> None:
    sizes = [9, 2, 0, 1, 3, 0]
    for at in range(sum(sizes)):
        flat = torch.ones(sum(sizes))
        flat[at] = bad
        assert finite(flat, sizes).tolist() == [bool(part.isfinite().all()) for part in flat.split(sizes)]
    assert finite(torch.ones(2), [2]).tolist() == [True] and finite(flatten([]), [0]).tolist() == [True]


def test_the_distance_is_that_of_the_definition() -> None:
    tensors, means = assorted()[:6], torch.randn(5000)
    flat = torch.cat([t.reshape(-1) for t in tensors])
    expected = (flat.double() - means[: flat.numel()].double()).square().sum()
    torch.testing.assert_close(squared_distance(tensors, means).double(), expected, rtol=1e-5, atol=0)
