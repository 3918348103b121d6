"""The law of the noise: N(0, 1), independent over steps, weights, optimizers and seeds, of the seed alone."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.gaussian import BLOCK
from lightning_entropy.engine.noise import NoiseStreams, seed_of


def noise(
    *params: Tensor, steps: int = 1, seed: int = 0, inner_steps: int = 10**6, lr: float = 1.0, **options: Any
) -> list[list[Tensor]]:
    """What every step adds to parameters that start at zero and have no gradient to follow."""
    params = tuple(torch.nn.Parameter(torch.zeros_like(p)) for p in params)
    optimizer = torch.optim.SGD(params, lr=lr)
    le.relax(optimizer, le.Relaxation(inner_steps=inner_steps, noise=1.0, **options), seed=seed)
    draws = []
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(steps):
        before = [p.detach().clone() for p in params]
        optimizer.step()
        draws.append([p.detach() - b for p, b in zip(params, before, strict=True)])
        with torch.no_grad():
            for p in params:
                p.zero_()
    return draws


def assert_normal(sample: Tensor) -> None:
    """Kolmogorov-Smirnov, four moments, and the tail; each would fail once in a thousand seeds."""
    x = sample.flatten().double().numpy()
    n = len(x)
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3
    assert abs(x.mean()) < 3.3 / n**0.5
    assert abs((x**2).mean() - 1) < 3.3 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 3.3 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 3.3 * (96 / n) ** 0.5
    expected = 2 * scipy.stats.norm.sf(3) * n
    assert abs((abs(x) > 3).sum() - expected) < 3.3 * expected**0.5 + 1


def assert_independent(left: Tensor, right: Tensor, shifts: tuple[int, ...] = (0, 1, -1, 2, 16)) -> None:
    """Neither the numbers nor their sizes go together, nor do they with the neighbours on either side."""
    a, b = left.flatten().double(), right.flatten().double()
    for f in (lambda x: x, torch.abs):
        u, v = f(a) - f(a).mean(), f(b) - f(b).mean()
        for shift in shifts:
            r = (u * v.roll(shift)).mean() / (u.std() * v.std())
            assert abs(r) < 4 / len(u) ** 0.5, (f, shift)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: torch.empty(300, 400),
    "float64": lambda: torch.empty(300, 400, dtype=torch.float64),
    "channels_last": lambda: torch.empty(40, 30, 10, 10).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.empty(300, 400).T,
    "three streams": lambda: torch.empty(2 * BLOCK + 12_345),
    "odd": lambda: torch.empty(100_003),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_adds_standard_normal_numbers(layout: str) -> None:
    ((n,),) = noise(LAYOUTS[layout]())
    assert_normal(n)
    assert len(torch.unique(n)) > 0.98 * n.numel()  # nothing is used twice; float32 has few values near 0


@pytest.mark.parametrize("lag", [1, 2, 15, 16, 2**15, BLOCK])
def test_weights_are_independent(lag: int) -> None:
    ((n,),) = noise(torch.empty(BLOCK + 200_000))
    assert_independent(n[:200_000], n[lag : lag + 200_000], shifts=(0,))


def test_steps_are_independent() -> None:
    draws = [n for (n,) in noise(torch.empty(100_000), steps=4)]
    for i in range(4):
        for j in range(i):
            assert_independent(draws[i], draws[j])


@pytest.mark.parametrize("size", [1, 5, 17])
def test_small_parameters_are_normal_over_the_steps(size: int) -> None:
    """The first numbers of thousands of streams: where badly seeded generators show."""
    n = torch.stack([n for (n,) in noise(torch.empty(size), steps=4000)])
    assert_normal(n)
    assert_normal(n[:, 0])
    assert_independent(n[:-1], n[1:], shifts=(0,))
    for other in range(1, size, 4):
        assert_independent(n[:, 0], n[:, other])


def test_outer_steps_do_not_start_the_noise_again() -> None:
    short = torch.stack([n for (n,) in noise(torch.empty(50), steps=60, inner_steps=7)])
    long = torch.stack([n for (n,) in noise(torch.empty(50), steps=60)])
    keep = [i for i in range(60) if i % 7 != 6]  # an outer step takes the 7th away
    assert torch.equal(short[keep], long[keep])
    assert len(torch.unique(long)) == long.numel()


def test_parameters_of_one_shape_are_independent() -> None:
    ((a, b, c),) = noise(*[torch.empty(100_000) for _ in range(3)])
    for left, right in ((a, b), (b, c), (a, c)):
        assert_independent(left, right)


@pytest.mark.parametrize("other", [1, 2, 1 << 64, (1 << 64) + 1])
def test_neighbouring_seeds_and_optimizers_are_independent(other: int) -> None:
    """Optimizer i of a module has seed + (i << 64)."""
    ((a,),), ((b,),) = noise(torch.empty(100_000), seed=0), noise(torch.empty(100_000), seed=other)
    assert_independent(a, b)


def test_seeds_are_scrambled_one_to_one() -> None:
    counters = [*range(50_000), *range(2**32 - 1000, 2**32)]
    seeds = {seed_of(123, c) for c in counters}
    assert len(seeds) == len(counters)
    assert all(0 <= s < 2**32 for s in seeds)
    assert seed_of(5, 7) == seed_of(12, 0) == seed_of(12 + 2**32, 0)
    # Half of the bits change from one counter to the next.
    flips = [(seed_of(0, c) ^ seed_of(0, c + 1)).bit_count() for c in range(1, 1000)]
    assert sum(flips) / len(flips) == pytest.approx(16, abs=0.5)


def test_no_stream_is_drawn_twice() -> None:
    params = [torch.nn.Parameter(torch.empty(s)) for s in (1, 10, BLOCK + 1, 3 * BLOCK)]
    streams = NoiseStreams(0)
    seeds = [s for step in range(300 * 7) for param in streams.seeds(params, params, step) for s in param]
    assert len(set(seeds)) == len(seeds) == 300 * 7 * 7


def test_a_group_added_later_repeats_no_stream() -> None:
    params = [torch.nn.Parameter(torch.empty(5)) for _ in range(4)]
    streams, seeds = NoiseStreams(0), []
    for step in range(50):
        present = params[:2] if step < 20 else params
        seeds += [s for param in streams.seeds(present, present, step) for s in param]
    assert len(set(seeds)) == len(seeds) == 20 * 2 + 30 * 4


def test_complex_parameters_get_both_parts() -> None:
    ((n,),) = noise(torch.empty(60_000, dtype=torch.complex64))
    assert_normal(n.real)
    assert_normal(n.imag)
    assert_independent(n.real, n.imag)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_get_the_rounded_numbers(dtype: torch.dtype) -> None:
    ((n,),), ((half,),) = noise(torch.empty(100_000)), noise(torch.empty(100_000, dtype=dtype))
    assert torch.equal(half, n.to(dtype))


@pytest.mark.parametrize("lr", [0.01, 0.5])
def test_the_temperature_follows_the_lr(lr: float) -> None:
    ((n,),) = noise(torch.empty(100_000), lr=lr)
    assert_normal(n / lr**0.5)


@pytest.mark.parametrize("shapes", [[(2**21 + 5,)], [(700, 800), (50, 20, 60, 20), (3,), (BLOCK + 1,)]])
def test_the_number_of_threads_changes_nothing(shapes: list[tuple[int, ...]]) -> None:
    tensors = [torch.empty(s) for s in shapes]
    tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(noise(*tensors, steps=2, gamma=1.0, average=0.5))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    ((a,),) = noise(torch.empty(BLOCK + 10), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    torch.randn(5)
    ((b,),) = noise(torch.empty(BLOCK + 10), seed=3)
    assert torch.equal(a, b)


def test_without_a_seed_torchs_own_is_used() -> None:
    torch.manual_seed(41)
    ((a,),), ((b,),) = noise(torch.empty(10), seed=None), noise(torch.empty(10), seed=41)
    torch.manual_seed(42)
    ((c,),) = noise(torch.empty(10), seed=None)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_parameter_without_a_gradient_does_not_shift_the_others() -> None:
    """Ranks and resumed runs agree whatever was frozen when."""
    ends = []
    for skipped in (False, True):
        params = [torch.nn.Parameter(torch.zeros(10)) for _ in range(3)]
        optimizer = torch.optim.SGD(params, lr=1.0)
        le.relax(optimizer, le.Relaxation(inner_steps=9, noise=1.0), seed=0)
        for i in range(4):
            for j, p in enumerate(params):
                p.grad = None if skipped and i == 1 and j == 0 else torch.zeros_like(p)
            optimizer.step()
        ends.append(params)
    assert not torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][2], ends[1][2])


def test_noise_goes_on_after_a_resume() -> None:
    def make(seed: int) -> tuple[torch.nn.Parameter, torch.optim.Optimizer, le.InnerOuter]:
        w = torch.nn.Parameter(torch.zeros(1000))
        optimizer = torch.optim.SGD([w], lr=1.0)
        return w, optimizer, le.relax(optimizer, le.Relaxation(inner_steps=5, noise=1.0), seed=seed)

    def run(w: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            w.grad = torch.zeros_like(w)
            optimizer.step()

    w, optimizer, loop = make(1)
    run(w, optimizer, 8)
    file = io.BytesIO()
    torch.save(copy.deepcopy(loop.state_dict()), file)
    run(w, optimizer, 9)
    file.seek(0)
    again, again_optimizer, again_loop = make(2)
    again_loop.load_state_dict(torch.load(file, weights_only=True))
    run(again, again_optimizer, 9)
    assert torch.equal(w, again)


@pytest.mark.parametrize("scale", ["absolute", "filter"])
def test_heat_draws_anew_for_every_gradient_with_variance_one_over_gamma(scale: Any) -> None:
    w = torch.nn.Parameter(torch.ones(200, 500))
    optimizer = torch.optim.SGD([w], lr=0.0)
    loop = le.relax(optimizer, le.heat(3, 16.0, scale=scale), seed=0)
    loop.begin()
    width = 0.25 if scale == "absolute" else 0.25 * 500**0.5
    draws = []
    for _ in range(4):
        draws.append((w.detach() - 1) / width)
        w.grad = torch.zeros_like(w)
        optimizer.step()
    for i in range(4):
        assert_normal(draws[i])
        for j in range(i):
            assert_independent(draws[i], draws[j])
