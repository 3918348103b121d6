"""The norms of filters, one by one and all at once."""

import pytest
import torch

from lightning_entropy.engine import filters
from lightning_entropy.engine.filters import all_filter_norms, filter_norms, filters_of, lengths_of

PARAMS = {
    "matrix": torch.randn(5, 7),
    "conv": torch.randn(4, 3, 2, 2),
    "channels_last": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "vector": torch.randn(6),
    "scalar": torch.tensor(-3.0),
    "transposed": torch.randn(3, 4).T,
    "complex": torch.randn(4, 3, dtype=torch.complex64),
    "empty": torch.randn(0, 3),
    "empty filters": torch.randn(3, 0),
    "zeros": torch.zeros(2, 3),
    "half": torch.randn(3, 4).bfloat16(),
    "double": torch.randn(3, 4, dtype=torch.float64),
}


def test_filter_norms() -> None:
    w = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    norms = filter_norms(w)
    assert norms.shape == (4, 1, 1, 1)
    torch.testing.assert_close(norms.flatten(), torch.stack([f.flatten().square().sum().sqrt() for f in w]))
    torch.testing.assert_close(filter_norms(w.flatten()), w.square().sum().sqrt())
    assert filter_norms(torch.tensor(-3.0)).item() == 3.0
    assert filter_norms(torch.zeros(2, 2)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("chunk", [4, 40, 1 << 25])
def test_all_at_once_are_those_one_by_one(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params = list(PARAMS.values())
    dtypes = [torch.promote_types(p.dtype, torch.float32) for p in params]
    alone = all_filter_norms(params, dtypes)
    assert all(torch.equal(n, filter_norms(p.to(d))) for n, p, d in zip(alone, params, dtypes, strict=True))
    monkeypatch.setattr(filters, "one_by_one", lambda p: False)
    monkeypatch.setattr(filters, "CHUNK", chunk)
    together = all_filter_norms(params, dtypes)
    for a, b in zip(alone, together, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_how_long_filters_are() -> None:
    assert filters_of(PARAMS["conv"]) == (4, 12)
    assert filters_of(PARAMS["vector"]) == (1, 6)
    assert filters_of(PARAMS["scalar"]) == (1, 1)
    assert lengths_of(((2, 3), (1, 6)), torch.device("cpu")).tolist() == [3, 3, 6]
