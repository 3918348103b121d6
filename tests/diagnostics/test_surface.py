"""Modules that touch their own tensors have the numbers of the same net that does not."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import lightning_entropy.diagnostics as D
from lightning_entropy.diagnostics.surface import LossSurface
from lightning_entropy.diagnostics.untouched import untouched


class Net(nn.Module):
    """A net that may run its middle again in the backward pass."""

    def __init__(self, saves_memory: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8))
        self.saves_memory = saves_memory

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = checkpoint(self.middle, h, use_reentrant=False) if self.saves_memory else self.middle(h)
        return self.last(h)


def data(n: int = 12) -> list[Any]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)) for _ in range(2)]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_activation_checkpointing_changes_nothing(mode: str) -> None:
    found = []
    for saves_memory in (False, True):
        net = Net(saves_memory)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with untouched(net, mode):
            surface = LossSurface(net, data(), mode=mode)
            w = surface.weights + 0.5 * torch.randn(len(surface), generator=torch.Generator().manual_seed(2))
            vectors = torch.randn(2, len(surface), generator=torch.Generator().manual_seed(3))
            found.append((surface.gradient(w), surface.hessian_products(w, vectors)))
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_one_batch_whose_graph_is_kept_is_run_again_at_its_own_weights() -> None:
    found = []
    for saves_memory in (False, True):
        net = Net(saves_memory)
        with untouched(net):
            surface = LossSurface(net, data()[:1])
            w, ones = surface.weights + 0.3, torch.ones(1, len(surface))
            first = surface.hessian_products(w, ones)
            surface.loss(w + 1.0)  # other weights in between
            found.append((first, surface.hessian_products(w, ones)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1][0], found[1][1])


class Items(nn.Module):
    def __init__(self, kind: Any = nn.Embedding, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items, self.out = kind(10, 4, **options), nn.Linear(4, 3)

    def forward(self, index: Tensor) -> Tensor:
        found = self.items(index)
        return self.out(found.mean(1) if found.ndim == 3 else found)


WORDS = [(torch.arange(18).view(6, 3) % 10, torch.tensor([0, 1, 2, 0, 1, 2]))]


def test_a_sparse_embedding_is_as_a_dense_one() -> None:
    dense, sparse = (D.hessian_spectrum(Items(sparse=s), WORDS, probes=0) for s in (False, True))
    assert dense.largest == pytest.approx(sparse.largest)
    a, b = (D.gradient_noise(Items(sparse=s), WORDS).scalars() for s in (False, True))
    assert a == pytest.approx(b)


def test_max_norm_is_the_net_whose_rows_are_within_it() -> None:
    limited, plain = Items(max_norm=0.5), Items()
    with torch.no_grad():
        plain.items.weight.copy_(plain.items.weight.renorm(2, 0, 0.5))
    before = limited.items.weight.detach().clone()
    a, b = (D.hessian_spectrum(net, WORDS, probes=0) for net in (limited, plain))
    assert a.largest == pytest.approx(b.largest, rel=1e-4)
    assert torch.equal(limited.items.weight, before)


def test_complex_weights_are_pairs_of_real_ones() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0 + 2.0j, -1.0j]))

    surface = LossSurface(Complex(), [torch.ones(1)], loss=lambda m, x: (m.w.abs() ** 2).sum() * x.mean())
    assert surface.weights.tolist() == [1.0, 2.0, 0.0, -1.0]
    assert surface.gradient(surface.weights).tolist() == [2.0, 4.0, 0.0, -2.0]


@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.spectral_norm, None])
def test_parametrized_and_tied_weights_are_left_alone(make: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    if make is None:
        net[2].weight = net[0].weight
    else:
        make(net[2])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = D.hessian_spectrum(net, data(), mode="train", probes=0)
    assert found.largest > 0
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Small(nn.Module):
    """A device that has no memory for more than so many examples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.most = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), most
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.net(x)


def quantities(net: nn.Module, mode: str = "eval") -> list[Any]:
    with untouched(net, mode):
        surface = LossSurface(net, [(x.double(), y) for x, y in data(13)], mode=mode)
        v = torch.randn(2, len(surface), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        w = surface.weights
        return [surface.value, surface.examples, surface.gradient(w), surface.hessian_products(w, v), len(surface)]


def test_batches_without_memory_are_halved_until_there_is() -> None:
    """13 examples, then 7, then 4; and nothing is tried again afterwards."""
    net = Small(4)
    with pytest.warns(UserWarning, match="no memory for a batch of") as said:
        found = quantities(net)
    assert [str(w.message).split(":")[0] for w in said] == [
        "no memory for a batch of 13 examples",
        "no memory for a batch of 7 examples",
    ]
    torch.testing.assert_close(found, quantities(Small(99)), rtol=1e-12, atol=1e-14)


def test_one_batch_that_is_halved_in_a_hessian_product_gives_the_product_of_the_whole() -> None:
    """The graph that is kept for a single batch is not the halves'."""
    net = Small(99)
    with untouched(net):
        surface = LossSurface(net, [(x.double(), y) for x, y in data(12)[:1]])
        v = torch.ones(1, len(surface), dtype=torch.float64)
        whole = surface.hessian_products(surface.weights, v)
        surface._module.module.most = 6  # type: ignore[assignment]
        surface._graph = None
        with pytest.warns(UserWarning, match="no memory for a batch of 12 examples: batches are cut to 6"):
            torch.testing.assert_close(surface.hessian_products(surface.weights, v), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("most", "mode"), [(0, "eval"), (4, "train")])
def test_what_cannot_be_halved_is_torchs_own_error(most: int, mode: str) -> None:
    """A single example; and train mode, in which BatchNorm makes a batch more than its examples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if most == 0 else "error")
        with pytest.raises(torch.OutOfMemoryError):
            quantities(Small(most), mode)


def test_a_batch_that_does_not_say_how_it_is_cut_is_the_reason() -> None:
    class Whole(Small):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as error, untouched(net := Whole(1)):
        LossSurface(net, [torch.ones(4, 3, 3)], loss=lambda m, b: m(b).mean(), examples=lambda b: 3)
    assert isinstance(error.value.__cause__, ValueError)
