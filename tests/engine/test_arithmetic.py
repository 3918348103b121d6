"""Each function against a one-line formula, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_entropy.engine import arithmetic as F

SHAPES: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.randn((), dtype=torch.float64),
    "vector": lambda: torch.randn(5, dtype=torch.float64),
    "matrix": lambda: torch.randn(4, 3, dtype=torch.float64),
    "long": lambda: torch.randn(2**15 + 5, dtype=torch.float64),
    "channels_last": lambda: torch.randn(4, 3, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 5, 5, dtype=torch.float64).to(
        memory_format=torch.channels_last_3d
    ),
    "transposed": lambda: torch.randn(3, 4, dtype=torch.float64).T,
    "strided": lambda: torch.randn(8, 6, dtype=torch.float64)[::2, ::3],
    "complex": lambda: torch.randn(4, 3, dtype=torch.complex128),
    "empty": lambda: torch.randn(0, 3, dtype=torch.float64),
}


def three(make: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return make(), make(), make()


def assert_close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [0.0, 0.3, 1.0, 1e300, torch.tensor(0.3), torch.tensor(0.0)])
def test_pull(shape: str, k: float | Tensor) -> None:
    y, x, _ = three(SHAPES[shape])
    expected = (y + k * x) / (1 + k) if float(k) < 1e300 else x
    F.pull_([y], [x], [k])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14 if isinstance(k, float) else 1e-6)


def test_no_stiffness_leaves_y_to_the_last_bit() -> None:
    y, x, _ = three(SHAPES["long"])
    before = y.clone()
    F.pull_([y], [x], [0.0])
    assert torch.equal(y, before)


def test_pull_is_the_proximal_map() -> None:
    """It minimises (v - y)^2 / 2 + k/2 (v - x)^2."""
    y, x, _ = three(SHAPES["vector"])
    v = y.clone()
    F.pull_([v], [x], [0.7])
    assert_close((v - y) + 0.7 * (v - x), torch.zeros_like(v))


@pytest.mark.parametrize("shape", SHAPES)
def test_attract(shape: str) -> None:
    y, x, _ = three(SHAPES[shape])
    expected = y - 0.3 * (y - x)
    F.attract_([y], [x], [0.3])
    assert_close(y, expected)


@pytest.mark.parametrize("weight", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_average(shape: str, weight: float) -> None:
    y, _, z = three(SHAPES[shape])
    expected = (1 - weight) * z + weight * y
    F.average_([z], [y], weight)
    assert_close(z, expected)


def test_the_running_mean_weighs_by_powers() -> None:
    """z after L steps is (1 - a)^L x + sum of a (1 - a)^(L - l) y_l."""
    ys, a = torch.randn(6, dtype=torch.float64), 0.75
    z = torch.tensor(2.0, dtype=torch.float64)
    for y in ys:
        F.average_([z], [y], a)
    expected = (1 - a) ** 6 * 2.0 + sum(a * (1 - a) ** (5 - i) * y.item() for i, y in enumerate(ys))
    assert z.item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("noise", "average", "k"), [(0.0, 0.75, 0.3), (0.1, 1.0, 0.0), (0.1, 0.75, 0.3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_move_is_pull_shake_average(shape: str, noise: float, average: float, k: float) -> None:
    y, x, z = three(SHAPES[shape])
    n = torch.zeros_like(y)
    zero = torch.zeros_like(y)
    seeds = [[11]]
    F.inner_move_(F.Move([n], [zero], None, stiffness=[0.0], noise=[1.0], average=1.0, seeds=seeds))
    moved = (y + k * x) / (1 + k) + noise * n
    mean = z + average * (moved - z)
    F.inner_move_(F.Move([y], [x], [z], stiffness=[k], noise=[noise], average=average, seeds=seeds if noise else None))
    assert_close(y, moved)
    assert_close(z, mean)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_move_takes_each_parameters_own_numbers(noise: float) -> None:
    ys, xs, zs = ([torch.ones(3) * c for _ in range(3)] for c in (4.0, 2.0, 0.0))
    seeds = [[1], [2], [3]] if noise else None
    F.inner_move_(F.Move(ys, xs, zs, stiffness=[0.0, 1.0, 3.0], noise=[0.0, noise, 0.0], average=0.5, seeds=seeds))
    torch.testing.assert_close(ys[0], torch.full((3,), 4.0))
    torch.testing.assert_close(ys[2], torch.full((3,), 2.5))
    torch.testing.assert_close(zs[2], torch.full((3,), 1.25))
    assert ((ys[1] - 3).abs() > 0).all() == (noise > 0)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_tensors_of_other_layouts_meet_element_by_element(noise: float) -> None:
    """Anchors made before the model changed its memory format."""
    torch.manual_seed(0)
    y = torch.zeros(4, 3, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    x, z = torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.zeros(4, 3, 5, 5, dtype=torch.float64)
    F.inner_move_(
        F.Move([y], [x], [z], stiffness=[1.0], noise=[noise * 1e-3], average=0.5, seeds=[[1]] if noise else None)
    )
    assert (y - x / 2).abs().max() < 1e-2
    assert_close(z, y / 2)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_half_parameters_move_in_the_anchors_precision(half: torch.dtype, noise: float) -> None:
    """One rounding, at the end."""
    torch.manual_seed(0)
    y, x, z = torch.randn(1000).to(half), torch.randn(1000), torch.randn(1000)
    n, seeds = torch.zeros(1000), [[5]]
    F.inner_move_(F.Move([n], [torch.zeros(1000)], None, stiffness=[0.0], noise=[1.0], average=1.0, seeds=seeds))
    pulled = y.float().lerp(x, 0.3 / 1.3).to(half)
    expected = (pulled.float() + noise * n).to(half)
    mean = z.lerp(expected.float(), 0.75)
    F.inner_move_(F.Move([y], [x], [z], stiffness=[0.3], noise=[noise], average=0.75, seeds=seeds if noise else None))
    assert torch.equal(y, expected)
    torch.testing.assert_close(z, mean)


def test_a_rate_on_the_device_pulls_as_a_number_does() -> None:
    """A tensor, which a step must not read; one call for all parameters that share it."""
    ys, xs = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)], [torch.randn(4, 3).double() for _ in range(3)]
    k = torch.tensor(0.5, dtype=torch.float64)
    for pull, weight in ((F.pull_, 0.5 / 1.5), (F.attract_, 0.5)):
        expected = [y + weight * (x - y) for y, x in zip(ys, xs, strict=True)]
        pull(ys, xs, [k, k, 0.5])
        for y, e in zip(ys, expected, strict=True):
            assert_close(y, e)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "changed"])
def test_x_takes_what_was_written_into_y_and_keeps_its_precision_elsewhere(half: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    xs = [torch.randn(4, 3, 2, 2), torch.randn(7)]
    if layout == "channels_last":
        xs[0] = xs[0].to(memory_format=torch.channels_last)
    ys = [x.to(half) for x in xs]
    if layout == "changed":
        ys[0] = ys[0].to(memory_format=torch.channels_last)
    expected = [x.clone() for x in xs]
    ys[0][1, 2, 0, 1], expected[0][1, 2, 0, 1] = 3.0, 3.0
    ys[1][4], expected[1][4] = -2.0, -2.0
    F.copy_where_written_(xs, ys)
    for x, e in zip(xs, expected, strict=True):
        assert torch.equal(x, e)


def test_distances_and_norms() -> None:
    a, b = [torch.randn(3, 2), torch.randn(4)], [torch.randn(3, 2), torch.randn(4)]
    flat = torch.cat([(u - v).flatten() for u, v in zip(a, b, strict=True)])
    torch.testing.assert_close(F.rms_distance(a, b), flat.square().mean().sqrt())
    torch.testing.assert_close(F.norm(a), torch.cat([t.flatten() for t in a]).norm())
    assert F.rms_distance([torch.ones(2, dtype=torch.bfloat16)], [torch.full((2,), 1.0009765625)]).item() == 2**-10


@pytest.mark.parametrize("noise", [False, True])
def test_lists_of_other_lengths_are_refused(noise: bool) -> None:
    one, two = [torch.ones(1)], [torch.ones(1), torch.ones(1)]
    with pytest.raises(ValueError, match="zip"):
        F.pull_(one, two, [1.0])
    with pytest.raises(ValueError, match="zip"):
        F.attract_(one, one, [1.0, 1.0])
    with pytest.raises(ValueError, match="zip"):
        F.average_(one, two, 0.5)
    with pytest.raises(ValueError, match="zip"):
        F.inner_move_(F.Move(one, two, None, stiffness=[1.0], noise=[1.0], average=1.0, seeds=[[1]] if noise else None))


def test_values_differ_in_the_tensors_own_precision() -> None:
    half = torch.ones(2, dtype=torch.bfloat16)
    assert F.differ([(half, torch.tensor([1.0, 1.001])), (half, torch.tensor([1.0, 1.1]))]) == [False, True]
    assert F.differ([]) == []
