"""Modules that touch their own tensors have the numbers of the same net that does not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import lightning_entropy.diagnostics as D
from lightning_entropy.diagnostics.surface import LossSurface, untouched


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
