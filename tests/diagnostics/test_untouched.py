"""A module that was measured, and everything around it, is as it was."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_entropy.diagnostics.surface import LossSurface
from lightning_entropy.diagnostics.untouched import untouched


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(12, 4, generator=g), torch.randint(0, 3, (12,), generator=g)


def draws() -> list[float]:
    return [torch.rand(()).item(), float(np.random.rand()), random.random()]


@pytest.mark.parametrize("error", [None, KeyError])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_modes_and_random_numbers_are_put_back(mode: str, error: Any) -> None:
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    expected = draws()
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])
    try:
        with untouched(net, mode, seed=3):
            inside = draws()
            assert all(m.training == (mode == "train") for m in net.modules())
            if error:
                raise error
    except KeyError:
        pass
    assert [m.training for m in net.modules()] == [True, True, False, False]
    assert draws() == expected
    with untouched(net, mode, seed=3):
        assert draws() == inside != expected


def test_gradients_are_taken_whatever_is_around() -> None:
    net = nn.Linear(2, 2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), untouched(net):
        out = net(torch.ones(1, 2))
        assert out.dtype == torch.float32 and out.requires_grad and not out.is_inference()


def test_another_mode_is_refused() -> None:
    with (
        pytest.raises(ValueError, match='mode must be "eval" or "train", got \'test\''),
        untouched(nn.Linear(1, 1), "test"),
    ):
        pass


class Recurrent(nn.Module):
    """Notes whether cuDNN may run its forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Linear(4, 3)
        self.seen = list[bool]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.backends.cudnn.enabled)
        h = self.layer(x[:, None])
        return self.last((h[0] if isinstance(h, tuple) else h)[:, -1])


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_measured_without_cudnn_which_has_no_second_derivative_of_them(layer: Any) -> None:
    """Nor a first one in eval mode. The product is checked against differences of gradients."""
    (x, y), net = batch(), Recurrent(layer(4, 4, batch_first=True)).double()
    assert torch.backends.cudnn.enabled
    with untouched(net):
        surface = LossSurface(net, [(x.double(), y)])
        v = torch.randn(len(surface), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        found, step = surface.hessian_products(surface.weights, v[None])[0], 1e-5 * v
        ends = [surface.gradient(surface.weights + sign * step) for sign in (1, -1)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8)
    seen = surface._module.module.seen
    assert seen and not any(seen)  # type: ignore[arg-type]
    with pytest.raises(KeyError), untouched(net):
        raise KeyError
    assert torch.backends.cudnn.enabled


def test_other_modules_keep_cudnn() -> None:
    (x, y), net = batch(), Recurrent(nn.Sequential(nn.Linear(4, 4)))
    with untouched(net):
        seen = LossSurface(net, [(x, y)])._module.module.seen
    assert all(seen)  # type: ignore[arg-type]
