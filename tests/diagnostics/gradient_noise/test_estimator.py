from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_entropy.diagnostics import gradient_noise
from lightning_entropy.diagnostics.gradient_noise import example_gradients
from lightning_entropy.diagnostics.gradient_noise.estimator import _gram
from lightning_entropy.diagnostics.gradient_noise.example_gradients import CentredGradients
from lightning_entropy.diagnostics.surface import LossSurface
from tests.diagnostics import tiny


def per_example(module, batches):
    x = torch.cat([p.detach().flatten() for p in module.parameters()])
    rows = []
    for inputs, labels in batches:
        for i in range(len(labels)):
            one = tiny.flat_loss(module, [(inputs[i : i + 1], labels[i : i + 1])])
            rows.append(torch.func.grad(one)(x))
    return torch.stack(rows)


def diffusion(gradients):
    centred = gradients - gradients.mean(0)
    return centred.T @ centred / len(gradients)


# 39 weights: the Gram matrix of 30 examples, and D itself of 50.
@pytest.mark.parametrize("examples", [30, 50])
@pytest.mark.parametrize("settings", [{}, {"chunk": 4}, {"chunk": 7, "vectorize": False}])
def test_spectrum_equals_dense_one(examples, settings):
    module, batches = tiny.net(), tiny.data(examples)
    gradients = per_example(module, batches)
    dense = torch.linalg.eigvalsh(diffusion(gradients)).numpy()[::-1]
    found = gradient_noise(module, batches, **settings)
    np.testing.assert_allclose(found.eigenvalues, dense[: min(39, examples)], atol=1e-8)
    assert found.trace == pytest.approx(dense.sum(), rel=1e-8)
    assert found.gradient_squared == pytest.approx(gradients.mean(0).square().sum().item(), rel=1e-8)
    assert found.mean == pytest.approx(dense.mean(), rel=1e-8)
    assert found.std == pytest.approx(dense.std(), rel=1e-8)
    assert found.participation == pytest.approx(dense.sum() ** 2 / (dense**2).sum(), rel=1e-8)


def test_little_memory_costs_passes_and_no_accuracy():
    """27 rows of 39 numbers: blocks of 15 rows, each met by all later ones."""
    module, batches = tiny.net(), tiny.data(30)
    want = gradient_noise(module, batches).eigenvalues
    row = 39 * 8 / 2**30
    found = gradient_noise(module, batches, chunk=5, memory=30 * 30 * 8 / 2**30)
    np.testing.assert_allclose(found.eigenvalues, want, atol=1e-12)
    for chunk, held in ((5, 10), (4, 8), (7, 7), (1, 1)):
        gram = _gram(CentredGradients(LossSurface(module, batches), chunk, True), held, False)
        np.testing.assert_allclose(torch.linalg.eigvalsh(gram / 30).flip(0), want, atol=1e-12)
    with pytest.raises(ValueError, match=r"memory must be at least .* for a chunk of 5 gradients of 39 weights"):
        gradient_noise(module, batches, chunk=5, memory=10 * row)


def test_the_talks_recipe():
    module, batches = tiny.net(), tiny.data(30)
    dense = torch.linalg.eigvalsh(diffusion(per_example(module, batches))).numpy()
    threshold = dense.max() * 39 * np.finfo(np.float32).eps
    clipped = np.maximum(dense, threshold)
    found = gradient_noise(module, batches)
    assert found.clipped_mean == pytest.approx(clipped.mean(), rel=1e-8)
    assert found.clipped_std == pytest.approx(clipped.std(), rel=1e-8)
    assert found.rank == (dense > threshold).sum()
    assert found.rank_percent == pytest.approx(100 * found.rank / 39)


def test_minibatch_gradients_scatter_as_predicted():
    module, batches = tiny.net(), tiny.data(30)
    gradients = per_example(module, batches)
    found = gradient_noise(module, batches, lr=0.1, batch_size=6)
    generator = torch.Generator().manual_seed(0)
    draws = 20_000
    samples = {
        True: torch.randint(0, 30, (draws, 6), generator=generator),
        False: torch.rand(draws, 30, generator=generator).argsort(1)[:, :6],
    }
    for replacement, indices in samples.items():
        squares = (gradients[indices].mean(1) - gradients.mean(0)).square().sum(1)
        error = 4 * squares.std() / draws**0.5
        assert abs(squares.mean() - found.minibatch_variance(6, replacement=replacement)) < error
        assert abs(squares.mean() - found.minibatch_variance(6, replacement=not replacement)) > error
    assert found.minibatch_variance(30, replacement=False) == 0
    assert found.temperature == pytest.approx(0.1 / 12)
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, 30\]"):
        found.minibatch_variance(31, replacement=False)


def test_noise_scale_keeps_its_error_bar():
    """Gradients N(1, 2^2 I) in 3 dimensions: tr(D) / |g|^2 = 12 / 3 = 4, in 200 draws of 100 examples."""
    generator = torch.Generator().manual_seed(0)
    point, hits, values = tiny.Point(0.0, 0.0, 0.0), 0, []
    for _ in range(200):
        slopes = 1 + 2 * torch.randn(100, 3, generator=generator, dtype=torch.float64)
        found = gradient_noise(point, [slopes], loss=lambda m, b: (b @ m.x).mean()).noise_scale
        hits += found.covers(4.0)
        values.append(found.value)
    assert hits >= 190
    assert np.median(values) == pytest.approx(4.0, rel=0.1)


def test_no_gradient_left_gives_an_infinite_noise_scale():
    slopes = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    found = gradient_noise(tiny.Point(0.0), [slopes], loss=lambda m, b: (b @ m.x).mean())
    assert found.noise_scale.value == float("inf")
    assert str(found.noise_scale) == "not measured"


def test_batchnorm_in_eval_mode_and_nested_batches():
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    batches = [{"x": x, "y": [y]} for x, y in tiny.data(20)]

    def loss(m, b):
        return nn.functional.cross_entropy(m(b["x"]), b["y"][0])

    found = gradient_noise(module, batches, loss=loss)
    assert found.examples == 20
    np.testing.assert_allclose(
        found.eigenvalues, gradient_noise(module, batches, loss=loss, vectorize=False).eigenvalues, atol=1e-12
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 1}, "examples must be None or at least 2, got 1"),
        ({"chunk": 0}, "chunk must be None or at least 1, got 0"),
        ({"memory": 1e-8}, "memory must be at least"),
        (
            {"loss": lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="sum")},
            "loss must be a mean over",
        ),
        ({"loss": lambda m, b: m(b[0]).sum() * float("inf")}, "loss must be finite"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        gradient_noise(tiny.net(), tiny.data(), **change)


def test_what_vmap_cannot_do_is_said():
    def loss(m, b):
        return nn.functional.cross_entropy(m(b[0]), b[1]) * (1.0 if b[0].sum().item() else 2.0)

    with pytest.raises(ValueError, match="vectorize=False"):
        gradient_noise(tiny.net(), tiny.data(), loss=loss)
    assert gradient_noise(tiny.net(), tiny.data(), loss=loss, vectorize=False).trace > 0


def test_plot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = gradient_noise(tiny.net(), tiny.data()).plot()
    assert axes.get_ylabel() == "eigenvalue of D, (loss / weight)²"
    figure.canvas.draw()
    plt.close(figure)


@pytest.fixture
def most(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A device that has no memory for the gradients of more than so many examples side by side."""

    def limited(function: Any, **options: Any) -> Any:
        def run(w: Tensor, *tensors: Tensor) -> Tensor:
            if len(tensors[0]) > request.param:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.func.vmap(function, **options)(w, *tensors)

        return run

    monkeypatch.setattr(example_gradients, "vmap", limited)
    return request.param


@pytest.mark.parametrize(("most", "taken"), [(4, ["8"]), (3, ["8", "4"]), (0, ["8", "4", "2"])], indirect=["most"])
def test_a_chunk_without_memory_is_halved_from_there_on(most: int, taken: list[str]) -> None:
    """As often as need be; a single example needs no memory for others beside it."""
    with pytest.warns(UserWarning, match="no memory for the gradients of") as said:
        found = gradient_noise(tiny.net(), tiny.data(), chunk=8)
    assert [str(w.message).split()[6] for w in said] == taken
    plain = gradient_noise(tiny.net(), tiny.data(), chunk=8, vectorize=False)
    np.testing.assert_allclose(found.eigenvalues, plain.eigenvalues, rtol=1e-10, atol=1e-14)
    assert found.noise_scale.value == pytest.approx(plain.noise_scale.value, rel=1e-10)
