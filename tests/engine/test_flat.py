"""Tensors as lines of numbers."""

import pytest
import torch
from torch import Tensor

from lightning_entropy.engine.flat import flat, in_line, is_dense, joined, runs, shaped

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_joined_tensors_are_one_line(dtype: torch.dtype) -> None:
    tensors = list(TENSORS.values())
    line = joined(tensors, dtype)
    assert line.dtype == dtype and torch.equal(line, torch.cat([flat(t) for t in tensors]).to(dtype))
    line.zero_()
    assert any(t.any() for t in tensors)


def test_neighbours_in_memory_are_a_line_without_a_copy() -> None:
    base = torch.randn(12)
    parts = [base[2:6].view(4, 1, 1), base[6:7].view(()), base[7:11]]
    line = in_line(parts)
    assert torch.equal(line, base[2:11]) and line.data_ptr() == parts[0].data_ptr()
    for others in (parts[::-1], [parts[0], parts[2]], [torch.ones(2), torch.zeros(3)]):
        assert torch.equal(in_line(others), torch.cat([t.reshape(-1) for t in others]))


def test_another_tensors_memory_may_be_behind_by_chance() -> None:
    memory = bytearray(torch.arange(5.0).numpy().tobytes())
    parts = [torch.frombuffer(memory, dtype=torch.float32, count=n, offset=4 * at) for at, n in ((0, 3), (3, 2))]
    assert parts[1].data_ptr() == parts[0].data_ptr() + 12
    assert in_line(parts).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("sizes", "cut"), [([], []), ([7], [[0]]), ([0, 6, 0], [[0, 1, 2]]), ([5, 2, 4, 1], [[0], [1, 2], [3]])]
)
def test_runs_of_neighbours(sizes: list[int], cut: list[list[int]]) -> None:
    assert runs(sizes, 6) == cut
