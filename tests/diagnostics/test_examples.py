"""How many examples a batch has, and where they are cut, for every batch that Lightning moves."""

import collections
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lightning_entropy.diagnostics as D
from lightning_entropy.diagnostics.examples import Layout, map_batch


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)


@dataclasses.dataclass
class Pair:
    x: Tensor
    y: Tensor


Named = collections.namedtuple("Named", "x y")


@pytest.mark.parametrize("kind", ["dict", "defaultdict", "UserDict", "dataclass", "namedtuple"])
def test_every_batch_that_lightning_moves(kind: str) -> None:
    x, y = data()
    batch: Any = {
        "dict": {"x": x, "y": y},
        "defaultdict": collections.defaultdict(list, x=x, y=y),
        "UserDict": collections.UserDict(x=x, y=y),
        "dataclass": Pair(x, y),
        "namedtuple": Named(x, y),
    }[kind]
    mapping = kind in ("dict", "defaultdict", "UserDict")

    def loss(module: nn.Module, b: Any) -> Tensor:
        return nn.functional.cross_entropy(module(b["x"] if mapping else b.x), b["y"] if mapping else b.y)

    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    found = D.hessian_spectrum(net, [batch], loss=loss, examples=6, probes=0)
    plain = D.hessian_spectrum(net, [(x, y)], examples=6, probes=0)
    assert found.examples == 6
    assert found.largest == pytest.approx(plain.largest)


def test_a_time_first_batch_is_cut_in_its_examples() -> None:
    series, y = torch.randn(20, 6, 4), torch.arange(6)
    assert Layout().size((series, y)) == 6
    for layout in (Layout(), Layout(batch_dim=1), Layout(batch_dim=lambda batch: batch[0].ndim - 2)):
        x, targets = layout.cut((series, y), 0, 4)
        assert torch.equal(x, series[:, :4])
        assert torch.equal(targets, y[:4])
    assert Layout(batch_dim=-2).size([series]) == 6


def test_a_square_batch_is_batch_first_unless_told() -> None:
    square = torch.arange(36.0).view(6, 6)
    assert torch.equal(Layout().cut(square, 1, 3), square[1:3])
    assert torch.equal(Layout(batch_dim=1).cut(square, 1, 3), square[:, 1:3])


def test_lists_of_ids_are_cut_with_their_examples() -> None:
    batch = {"x": torch.arange(3), "ids": ["a", "b", "c"], "names": ["of", "classes"], "more": [torch.arange(3), "d"]}
    part = Layout().cut(batch, 1, 3)
    assert part["ids"] == ["b", "c"]
    assert part["names"] == ["of", "classes"]
    assert part["x"].tolist() == part["more"][0].tolist() == [1, 2]
    assert part["more"][1] == "d"


@pytest.mark.parametrize(
    ("layout", "batch", "message"),
    [
        (Layout(), (torch.zeros(5, 6), torch.zeros(6, 5)), "share one size.*batch_dim=.*examples="),
        (Layout(), (torch.zeros(5, 6), torch.zeros(7)), "share one size.*batch_dim=.*examples="),
        (Layout(), ["a", "b"], "tensor with a batch dimension, got list: .*examples="),
        (
            Layout(batch_dim=1),
            (torch.zeros(5, 6), torch.zeros(6, 5)),
            "batch_dim must be .*got 1.*examples=",
        ),
        (Layout(batch_dim=3), torch.zeros(5, 6), "batch_dim must be a dimension.*got 3"),
        (Layout(count=lambda b: 2.5), torch.zeros(5), "callable .* integer of at least 0, got 2.5 from it"),
    ],
)
def test_a_batch_that_does_not_say_is_an_error_that_names_the_argument(
    layout: Layout, batch: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layout.size(batch)


@pytest.mark.parametrize("dim", ["time", True, 1.0])
def test_another_batch_dim_is_refused(dim: Any) -> None:
    with pytest.raises(ValueError, match="batch_dim must be None, an integer or a callable"):
        D.hessian_spectrum(nn.Linear(4, 3), [data()], batch_dim=dim)
    with pytest.raises(ValueError, match="batch_dim must be None, an integer or a callable"):
        D.HessianSpectrum(batch_dim=dim)


def test_a_cut_that_would_read_differently_is_refused() -> None:
    """Four examples of twenty times four numbers: which four? And four times of six examples, cut to four."""
    with pytest.raises(ValueError, match=r"got 2 of size 4 in shape .*batch_dim="):
        Layout().cut((torch.zeros(20, 4, 4), torch.zeros(4)), 0, 2)
    with pytest.raises(ValueError, match=r"examples 0 to 4 .*batch_dim="):
        Layout().cut((torch.zeros(4, 6, 3), torch.zeros(6)), 0, 4)
    x, _ = Layout(batch_dim=1).cut((torch.zeros(4, 6, 3), torch.zeros(6)), 0, 4)
    assert x.shape == (4, 4, 3)


class Sequences(nn.Module):
    """Time first, as torch's recurrent nets are; padded or packed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.out = nn.GRU(4, 3), nn.Linear(3, 3)

    def forward(self, x: Any) -> Tensor:
        return self.out(self.rnn(x)[1][-1])


def series() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(5, 6, 4, generator=g), torch.arange(6) % 3


def test_gradients_of_time_first_examples() -> None:
    """Those of the batches of one example; the GRU, which vmap cannot do, is one of three nets of the same numbers."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(x).mean(0))

    x, y = series()
    ones = [(x[:, i : i + 1], y[i : i + 1]) for i in range(6)]
    want = D.gradient_noise(Mean(), ones).eigenvalues
    for options in ({}, {"batch_dim": 1}, {"vectorize": False}, {"batch_dim": 1, "chunk": 4}):
        found = D.gradient_noise(Mean(), [(x, y)], **options)
        np.testing.assert_allclose(found.eigenvalues, want, atol=1e-6)
    found = D.gradient_noise(Sequences(), [(x, y)], vectorize=False, chunk=4)
    np.testing.assert_allclose(found.eigenvalues, D.gradient_noise(Sequences(), ones).eigenvalues, atol=1e-6)


def test_lists_of_ids_go_with_single_examples() -> None:
    """A loss that weighs by id is that of the same weights as a tensor."""
    x, y = data(6)
    ids, weights = ["a", "b", "c", "a", "b", "c"], {"a": 1.0, "b": 2.0, "c": 0.5}

    def by_id(module: nn.Module, batch: Any) -> Tensor:
        each = nn.functional.cross_entropy(module(batch["x"]), batch["y"], reduction="none")
        return (each * each.new_tensor([weights[i] for i in batch["ids"]])).mean()

    def by_weight(module: nn.Module, batch: Any) -> Tensor:
        return (nn.functional.cross_entropy(module(batch["x"]), batch["y"], reduction="none") * batch["w"]).mean()

    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    found = D.gradient_noise(net, [{"x": x, "y": y, "ids": ids}], loss=by_id)
    want = D.gradient_noise(net, [{"x": x, "y": y, "w": torch.tensor([weights[i] for i in ids])}], loss=by_weight)
    np.testing.assert_allclose(found.eigenvalues, want.eigenvalues, atol=1e-6)


def packed(x: Tensor, lengths: list[int]) -> PackedSequence:
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)


def test_packed_sequences_say_how_many_they_are() -> None:
    """Of one length they are the padded ones."""
    x, y = series()
    with pytest.raises(ValueError, match=r"batch_dim=.*examples="):
        D.hessian_spectrum(Sequences(), [(packed(x, [5, 4, 3, 5, 2, 1]), y)])
    found = D.hessian_spectrum(Sequences(), [(packed(x, [5] * 6), y)], examples=lambda b: len(b[1]))
    assert found.examples == 6
    assert found.largest == pytest.approx(D.hessian_spectrum(Sequences(), [(x, y)]).largest, rel=1e-4)


class Graph:
    """As a graph library's batch: node features and edges of unequal sizes, one object that moves itself."""

    def __init__(self, nodes: Tensor, edges: Tensor, graph: Tensor, y: Tensor) -> None:
        self.nodes, self.edges, self.graph, self.y = nodes, edges, graph, y
        self.moved = 0

    @property
    def num_graphs(self) -> int:
        return len(self.y)

    def to(self, device: Any, **_: Any) -> "Graph":
        other = Graph(*(t.to(device) for t in (self.nodes, self.edges, self.graph, self.y)))
        other.moved = self.moved + 1
        return other


def graphs(sizes: list[int], seed: int = 3) -> Graph:
    g = torch.Generator().manual_seed(seed)
    nodes, edges = torch.randn(sum(sizes), 4, generator=g), torch.randint(0, sum(sizes), (2, 7), generator=g)
    return Graph(nodes, edges, torch.repeat_interleave(torch.tensor(sizes)), torch.arange(len(sizes)) % 3)


def of_graph(module: nn.Module, batch: Graph) -> Tensor:
    assert batch.moved == 1
    mixed = batch.nodes.index_add(0, batch.edges[0], batch.nodes[batch.edges[1]])
    pooled = mixed.new_zeros(batch.num_graphs, 4).index_add(0, batch.graph, mixed)
    return nn.functional.cross_entropy(module(pooled), batch.y)


def test_graph_batches_say_how_many_they_are() -> None:
    torch.manual_seed(0)
    net, batches = nn.Linear(4, 3), [graphs([3, 5]), graphs([2, 2, 4], 4)]
    with pytest.raises(ValueError, match="got Graph: say how many examples it has with examples="):
        D.hessian_spectrum(net, batches, loss=of_graph)
    parts = [D.hessian_spectrum(net, [b], loss=of_graph, examples=lambda b: b.num_graphs) for b in batches]
    found = D.hessian_spectrum(net, batches, loss=of_graph, examples=lambda b: b.num_graphs)
    assert found.examples == 5
    assert found.loss == pytest.approx(2 / 5 * parts[0].loss + 3 / 5 * parts[1].loss)  # each graph weighs the same
    with pytest.raises(ValueError, match=r"2 examples to be cut .* got Graph .*take data of one example a batch"):
        D.gradient_noise(net, batches, loss=of_graph, examples=lambda b: b.num_graphs)
    single = [graphs([n], n) for n in (3, 4, 5)]
    assert D.gradient_noise(net, single, loss=of_graph, examples=lambda b: b.num_graphs).examples == 3
    profile = D.flatness_profile(net, batches, [0.1], loss=of_graph, examples=lambda b: b.num_graphs)
    assert len(profile.rises) == 1


def test_map_batch_keeps_what_is_no_tensor() -> None:
    assert map_batch([torch.zeros(1), "name", None], lambda t: t + 1) == [torch.ones(1), "name", None]
