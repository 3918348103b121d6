"""Noise for many parameters: from streams of their own, and from chunks, as on a GPU."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine import filters, gaussian, noise
from lightning_entropy.engine.gaussian import BLOCK, SLICE, Place, Source, add_, shake_, streams
from lightning_entropy.engine.noise import NoiseStreams
from tests.engine.test_noise import assert_independent, assert_normal
from tests.reference import filter_norms

SHAPES: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.zeros(40, 30),
    "scalar": lambda: torch.zeros(()),
    "channels_last": lambda: torch.zeros(8, 3, 5, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.zeros(30, 40).T,
    "empty": lambda: torch.zeros(0, 3),
    "complex": lambda: torch.zeros(20, 3, dtype=torch.complex64),
    "half": lambda: torch.zeros(50, 3, dtype=torch.bfloat16),
    "double": lambda: torch.zeros(50, 3, dtype=torch.float64),
    "vector": lambda: torch.zeros(17),
    "long": lambda: torch.zeros(2 * SLICE + 5),
}


def wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What parameters on a GPU get, on the CPU."""
    for module in (gaussian, noise):
        monkeypatch.setattr(module, "has_streams", lambda p: False)
    monkeypatch.setattr(filters, "one_by_one", lambda p: False)
    yield
    filters.lengths_of.cache_clear()


def draw(params: list[Tensor], every: list[Tensor] | None = None, step: int = 0, seed: int = 0) -> list[Tensor]:
    """N(0, 1) numbers for some of the parameters."""
    sources = NoiseStreams(seed).seeds(params, params if every is None else every, step)
    numbers = [torch.zeros_like(p, dtype=wide(p)) for p in params]
    shake_(numbers, [n.dtype for n in numbers], [1.0] * len(numbers), sources)
    return numbers


# Streams


@pytest.mark.parametrize("scale", ["number", "filters"])
def test_together_or_alone_a_parameter_gets_the_same_numbers(scale: str) -> None:
    """Small ones share a call, which changes no bit of them."""
    torch.manual_seed(0)
    params = [make() for make in SHAPES.values()] * 2
    params = [p + torch.randn(p.shape).to(p.dtype) for p in params]
    dtypes = [wide(p) for p in params]
    scales: list[float | Tensor] = [0.5] * len(params)
    if scale == "filters":
        scales = [filters.filter_norms(p.to(d)) for p, d in zip(params, dtypes, strict=True)]
    sources: list[Source] = [[i] for i in range(len(params))]
    together = [p.clone() for p in params]
    shake_(together, dtypes, scales, sources)
    for p, other, dtype, s, source in zip(params, together, dtypes, scales, sources, strict=True):
        before = p.clone()
        shake_([p], [dtype], [s], [source])
        assert torch.equal(p, other)
        assert p.numel() == 0 or not torch.equal(p, before)


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5), torch.tensor([[0.5], [2.0], [0.0], [1.0]])])
@pytest.mark.parametrize("half", [False, True])
def test_adding(scale: float | Tensor, half: bool) -> None:
    torch.manual_seed(0)
    y, n = torch.randn(4, 3).to(torch.bfloat16 if half else torch.float32), torch.randn(4, 3)
    expected = (y + scale * n).to(y.dtype)
    add_([y], [n], scale)
    torch.testing.assert_close(y, expected)


def test_streams_are_a_million_weights_each() -> None:
    sizes = {0: 1, 1: 1, 2**20: 1, 2**20 + 1: 2, 2**21: 2}
    for size, count in sizes.items():
        assert streams(torch.empty(size, device="meta")) == count == max(1, math.ceil(size / BLOCK))


# Chunks


@pytest.mark.usefixtures("chunks")
def test_a_chunk_is_one_line_of_standard_normal_numbers() -> None:
    params = [torch.zeros(300, 400), torch.zeros(7), torch.zeros(100, 500)]
    sources = NoiseStreams(0).seeds(params, params, 0)
    assert [s[1:] for s in sources] == [(0, 170_007), (120_000, 170_007), (120_007, 170_007)]
    assert len({s[0] for s in sources}) == 1
    line = torch.empty(170_007).normal_(generator=torch.Generator().manual_seed(sources[0][0]))
    drawn = draw(params)
    assert torch.equal(torch.cat([n.view(-1) for n in drawn]), line)
    assert_normal(line)
    assert_independent(drawn[0].view(-1)[:50_000], drawn[2].view(-1))


@pytest.mark.usefixtures("chunks")
def test_every_layout_gets_the_numbers_of_its_place() -> None:
    params = [make() for make in SHAPES.values()]
    for p, n in zip(params, draw(params), strict=True):
        assert n.stride() == p.stride() or p.numel() == 0
        numbers = torch.view_as_real(n) if n.is_complex() else n
        assert len(torch.unique(numbers)) > 0.98 * numbers.numel() - 1  # float32 has few values near 0


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("chunk", [100, 1000, 1 << 25])
def test_a_parameter_that_does_not_move_shifts_no_others(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "CHUNK", chunk)
    every = [make() for make in SHAPES.values()]
    drawn = draw(every)
    for left_out in range(len(every)):
        some = [p for i, p in enumerate(every) if i != left_out]
        expected = [n for i, n in enumerate(drawn) if i != left_out]
        assert all(torch.equal(a, b) for a, b in zip(draw(some, every), expected, strict=True))


@pytest.mark.usefixtures("chunks")
def test_chunks_are_bounded_and_of_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "CHUNK", 100)
    every = [torch.zeros(60), torch.zeros(40), torch.zeros(1), torch.zeros(300), torch.zeros(2, dtype=torch.float64)]
    seen: dict[int, int] = {}
    for step in range(50):
        for source in NoiseStreams(0).seeds(every, every, step):
            assert isinstance(source, Place)
            seen[source.seed] = source.size
    assert len(seen) == 50 * 4
    assert set(seen.values()) == {100, 1, 300, 2}


@pytest.mark.usefixtures("chunks")
def test_steps_and_seeds_of_chunks_are_independent() -> None:
    params = [torch.zeros(100_000)]
    draws = [draw(params, step=t)[0] for t in range(3)] + [draw(params, seed=1)[0]]
    for i, a in enumerate(draws):
        assert torch.equal(a, draw(params, step=i)[0]) == (i < 3)
        for b in draws[:i]:
            assert_independent(a, b)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("some", [False, True])
def test_noise_of_a_chunk_in_the_scale_of_filters(some: bool) -> None:
    torch.manual_seed(0)
    every = [make() for make in SHAPES.values()]
    every = [p + torch.randn(p.shape).to(p.dtype) for p in every]
    params = every[::2] if some else every
    drawn = draw(params, every)
    moved = [p.clone() for p in params]
    scales: list[float | Tensor] = [filters.filter_norms(p.to(wide(p))) for p in params]
    shake_(moved, [wide(p) for p in params], scales, NoiseStreams(0).seeds(params, every, 0))
    for p, m, n in zip(params, moved, drawn, strict=True):
        (scale,) = filter_norms([p.abs().to(n.real.dtype) if p.is_complex() else p.to(n.dtype)])
        expected = (p.to(n.dtype) + scale * n).to(p.dtype)
        torch.testing.assert_close(m, expected, rtol=1e-5 if p.dtype != torch.bfloat16 else 1e-2, atol=1e-6)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("rate", [0.25, torch.tensor(0.25)])
def test_parameters_of_a_chunk_may_have_other_rates(rate: float | Tensor) -> None:
    params = [torch.zeros(40, 30), torch.zeros(7), torch.zeros(5, 5)]
    drawn = draw(params)
    moved = [p.clone() for p in params]
    shake_(moved, [torch.float32] * 3, [rate, 0.5, rate], NoiseStreams(0).seeds(params, params, 0))
    for m, n, s in zip(moved, drawn, (0.25, 0.5, 0.25), strict=True):
        torch.testing.assert_close(m, s * n)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    "relaxation",
    [
        le.entropy_sgd(3, 0.5, 0.1), le.heat(2, 1e2), le.heat(1, 1e2, scale="filter"),
        le.smoothed_lookahead(3), le.Relaxation(inner_steps=3, noise=0.1, width=0.1, average=0.5, gamma=le.Pull(0.5)),
    ],
    ids=lambda r: f"{r.scale} {r.noise} {r.width}",
)  # fmt: skip
def test_a_loop_goes_on_after_a_resume_and_its_noise_is_repeated(relaxation: le.Relaxation) -> None:
    def run(steps: range, state: dict[str, dict[str, object]] | None = None) -> tuple[list[Tensor], le.InnerOuter]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 2, 3)).double()
        loop = le.relax(torch.optim.SGD(net.parameters(), lr=0.1), relaxation, seed=1 if state is None else 2)
        if state is not None:
            net.load_state_dict(state["net"])
            loop.load_state_dict(state["loop"])
        for i in steps:
            loop.prepare()
            loop.optimizer.zero_grad()
            net(torch.full((1, 2, 6, 6), float(i), dtype=torch.float64)).square().mean().backward()
            loop.optimizer.step()
        with loop.at_anchor():
            end = [p.detach().clone() for p in net.parameters()]
            state = {"net": {k: v.clone() for k, v in net.state_dict().items()}, "loop": loop.state_dict()}
        return end, state  # type: ignore[return-value]

    whole, _ = run(range(9))
    _, state = run(range(5))
    resumed, _ = run(range(5, 9), state)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
