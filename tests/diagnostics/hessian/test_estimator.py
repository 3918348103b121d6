import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.special import erf
from torch import nn

from lightning_entropy.diagnostics import hessian_spectrum
from lightning_entropy.diagnostics.hessian.density import smoothed_density
from lightning_entropy.diagnostics.surface import LossSurface
from tests.diagnostics import tiny


def truth(module, batches):
    x = torch.cat([p.detach().flatten() for p in module.parameters()])
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(tiny.flat_loss(module, batches), x)).numpy()[::-1]


def symmetric(size, seed):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("batch", [8, 30])  # Several batches, the last smaller; and one, whose graph is kept.
def test_eigenvalues_equal_dense_ones(batch):
    module, batches = tiny.net(), tiny.data(batch=batch)
    dense = truth(module, batches)
    exact = hessian_spectrum(module, batches)
    assert exact.exact
    np.testing.assert_allclose(exact.eigenvalues, dense, atol=1e-12)
    assert exact.trace.value == pytest.approx(dense.sum(), abs=1e-12)

    found = hessian_spectrum(module, batches, top=4, bottom=3, dense_limit=0, tolerance=1e-9)
    np.testing.assert_allclose(found.eigenvalues, np.r_[dense[:4], dense[-3:]], atol=1e-6 * dense[0])
    assert (np.abs(found.eigenvalues - np.r_[dense[:4], dense[-3:]]) <= found.eigenvalue_errors + 1e-12).all()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_curvlinops_agrees():
    curvlinops = pytest.importorskip("curvlinops")
    module, batches = tiny.net(), tiny.data()
    x = torch.randn(39, dtype=torch.float64)
    operator = curvlinops.HessianLinearOperator(
        module, nn.CrossEntropyLoss(), list(module.parameters()), batches, check_deterministic=False
    )
    surface = LossSurface(module, batches)
    torch.testing.assert_close(surface.hessian_products(surface.weights, x[None])[0], operator @ x)


def test_trace_and_density_keep_their_error_bars():
    """In 200 seeds the truth is inside the stated error bar at least 190 times."""
    module, batches = tiny.net(), tiny.data(batch=30)
    dense = truth(module, batches)
    hits_trace, hits_density = 0, []
    for seed in range(200):
        found = hessian_spectrum(
            module, batches, top=1, bottom=1, probes=8, steps=8, dense_limit=0, tolerance=0.1, seed=seed, sigma=0.1
        )
        hits_trace += found.trace.covers(dense.sum())
        density = smoothed_density(dense, np.full(39, 1 / 39), found.grid, 0.1)
        # Where one smoothed eigenvalue is visible; 1e-3 of the peak is left for the Lanczos steps not taken.
        visible = density > 1e-2 * density.max()
        inside = np.abs(found.density - density) <= found.density_errors + 1e-3 * density.max()
        hits_density.append(inside[visible].mean())
    assert hits_trace >= 190
    assert np.mean(hits_density) >= 0.95


def test_deflation_sharpens_the_trace():
    """Outliers 100 and 50 above a bulk of ones, of trace 188, in no preferred directions."""
    rotation, _ = torch.linalg.qr(symmetric(40, 0))
    eigenvalues = torch.ones(40, dtype=torch.float64)
    eigenvalues[:2] = torch.tensor([100.0, 50.0])
    matrix = rotation @ torch.diag(eigenvalues) @ rotation.T

    def trace(top):
        found = hessian_spectrum(
            tiny.Point(*range(40)),
            [matrix],
            loss=lambda m, b: m.x @ b @ m.x / 2,
            top=top,
            bottom=0,
            steps=1,
            dense_limit=0,
        )
        return found.trace

    assert trace(0).covers(188)
    assert trace(2).covers(188)
    assert trace(2).stderr < 0.01 * trace(0).stderr


def test_near_zero_brackets_the_count():
    module, batches = tiny.net(), tiny.data()
    dense = truth(module, batches)
    for width in (1e-3, 0.03, 0.3, 100.0):
        want = (np.abs(dense) <= width).mean()
        assert hessian_spectrum(module, batches).near_zero(width) == (want, want)
        low, high = hessian_spectrum(module, batches, dense_limit=0, steps=25, probes=10).near_zero(width)
        assert low <= want <= high
    assert (low, high) == (1.0, 1.0) or high - low < 0.2


def test_density_integrates_to_one():
    for limit in (0, 1000):
        found = hessian_spectrum(tiny.net(), tiny.data(), dense_limit=limit)
        assert trapezoid(found.density, found.grid) == pytest.approx(erf(4 / np.sqrt(2)), abs=1e-3)


def test_modes_differ_and_train_mode_is_a_fixed_function():
    module = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double()
    train = hessian_spectrum(module, tiny.data(), mode="train", dense_limit=0, steps=8)
    again = hessian_spectrum(module, tiny.data(), mode="train", dense_limit=0, steps=8)
    assert train.eigenvalues.tolist() == again.eigenvalues.tolist()
    assert train.largest != hessian_spectrum(module, tiny.data(), dense_limit=0).largest
    dense = hessian_spectrum(module, tiny.data(), mode="train")
    np.testing.assert_allclose(train.eigenvalues[0], dense.eigenvalues[0], rtol=1e-4)


def test_frozen_weights_are_constants():
    module, batches = tiny.net(), tiny.data()
    module[0].requires_grad_(False)
    x = torch.cat([p.detach().flatten() for p in module.parameters()])
    whole = torch.autograd.functional.hessian(tiny.flat_loss(module, batches), x)
    found = hessian_spectrum(module, batches)
    assert found.weights == 15
    np.testing.assert_allclose(found.eigenvalues[::-1], torch.linalg.eigvalsh(whole[-15:, -15:]), atol=1e-12)


def test_linear_loss_has_no_curvature():
    found = hessian_spectrum(tiny.Point(1.0, 2.0), [torch.ones(2)], loss=lambda m, b: m.x.sum())
    assert found.eigenvalues.tolist() == [0.0, 0.0]


def test_attention_is_differentiated_twice():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)).mean(1)

    batch = torch.randn(6, 3, 4), torch.randint(0, 4, (6,))
    assert hessian_spectrum(Attention(), [batch]).largest > 0


def test_half_precision_weights_are_promoted():
    module, batches = tiny.net(dtype=torch.bfloat16), tiny.data(dtype=torch.bfloat16)
    want = hessian_spectrum(tiny.net(dtype=torch.bfloat16).float(), [(x.float(), y) for x, y in batches]).eigenvalues
    np.testing.assert_array_equal(hessian_spectrum(module, batches).eigenvalues, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": -1}, "top must be at least 0, got -1"),
        ({"probes": 1}, "probes must be 0 or at least 2, got 1"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"mode": "test"}, 'mode must be "eval" or "train", got \'test\''),
        ({"examples": 0}, "examples must be None or at least 1, got 0"),
        ({"dense_limit": 0, "memory": 1e-6}, r"memory must be at least .* GiB for 43 vectors of 39 weights"),
        ({"loss": lambda m, b: m(b[0])}, r"loss must be a scalar tensor, got torch.float64 \(8, 3\)"),
        ({"loss": lambda m, b: m(b[0]).sum() * float("nan")}, "loss must be finite, got nan on batch 0"),
        ({"loss": lambda m, b: torch.tensor(1.0)}, "loss must depend on the trainable weights"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        hessian_spectrum(tiny.net(), tiny.data(), **change)


def test_bad_data_and_modules():
    with pytest.raises(ValueError, match="data must hold at least one example, got an empty loader"):
        hessian_spectrum(tiny.net(), [])
    with pytest.raises(ValueError, match="module must have a trainable weight"):
        hessian_spectrum(tiny.net().requires_grad_(False), tiny.data())
    with pytest.raises(ValueError, match="pass loss="):
        hessian_spectrum(tiny.net(), [x for x, _ in tiny.data()])
    with pytest.raises(ValueError, match="pass loss="):
        hessian_spectrum(tiny.net(), [(x, x) for x, _ in tiny.data()])


def test_plot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for limit in (0, 1000):
        figure, axes = hessian_spectrum(tiny.net(), tiny.data(), dense_limit=limit).plot()
        assert axes.get_xlabel().startswith("eigenvalue")
        figure.canvas.draw()
        plt.close(figure)
    hessian_spectrum(tiny.net(), tiny.data(), dense_limit=0, probes=0).plot(plt.figure().subplots())
    plt.close("all")
