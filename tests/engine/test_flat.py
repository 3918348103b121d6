"""Tensors as lines of numbers."""

import pytest
import torch
from torch import Tensor

from lightning_entropy.engine.flat import flat, is_dense, runs, shaped

TENSORS = {
    "scalar": torch.randn(()),
    "matrix": torch.randn(4, 3),
    "channels_last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": torch.randn(2, 3, 2, 5, 5).to(memory_format=torch.channels_last_3d),
    "1 x 1": torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
    "empty": torch.randn(0, 3),
}


@pytest.mark.parametrize("t", TENSORS.values(), ids=TENSORS)
def test_a_dense_tensor_is_a_view_of_its_memory_and_back(t: Tensor) -> None:
    line = flat(t)
    assert is_dense(t)
    assert line.data_ptr() == t.data_ptr() and line.numel() == t.numel()
    assert torch.equal(line, torch.as_strided(t, (t.numel(),), (1,)))
    back = shaped(line.clone(), t)
    assert torch.equal(back, t) and back.stride() == t.stride()


@pytest.mark.parametrize("t", [torch.randn(3, 4).T, torch.randn(8, 6)[::2, ::3]])
def test_another_tensor_is_in_the_order_of_its_indices(t: Tensor) -> None:
    assert not is_dense(t)
    assert torch.equal(flat(t), t.contiguous().view(-1))
    assert torch.equal(shaped(flat(t), t), t)


def test_a_filter_comes_after_another_in_memory() -> None:
    t = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    assert torch.equal(flat(t).view(4, -1).sort(dim=1).values, t.flatten(1).sort(dim=1).values)


def test_a_complex_numbers_parts_stand_side_by_side() -> None:
    t = torch.tensor([[1 + 2j, 3 - 4j]])
    assert torch.equal(shaped(torch.tensor([1.0, 2.0, 3.0, -4.0]), t), t)


@pytest.mark.parametrize(
    ("sizes", "cut"), [([], []), ([7], [[0]]), ([0, 6, 0], [[0, 1, 2]]), ([5, 2, 4, 1], [[0], [1, 2], [3]])]
)
def test_runs_of_neighbours(sizes: list[int], cut: list[list[int]]) -> None:
    assert runs(sizes, 6) == cut
