"""How often the host waits for the device: not for every vector, proposal, draw or chunk of examples."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightning_entropy.diagnostics as D
from lightning_entropy.diagnostics.hessian import lanczos
from tests.device_calls import Calls
from tests.diagnostics.tiny import data, net

STEEP = {"gamma": 100.0, "temperature": 1e-2, "leaps": 1, "draws": 2}  # few rungs
# What is measured, how often the work of it may be multiplied by, and the arguments that do.
MORE: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "density": (D.hessian_spectrum, {"top": 0, "bottom": 0, "probes": 4, "dense_limit": 1}, {"steps": (5, 20)}),
    "grouped density": (
        D.hessian_spectrum,
        {"top": 0, "bottom": 0, "probes": 4, "dense_limit": 1, "groups": 4},
        {"steps": (5, 20)},
    ),
    "trace": (D.hessian_spectrum, {"top": 0, "bottom": 0, "steps": 1, "dense_limit": 1}, {"probes": (4, 16)}),
    "samples": (D.local_entropy, {**STEEP, "warmup": 2}, {"samples": (2, 12)}),
    "warmup": (D.local_entropy, {**STEEP, "samples": 2}, {"warmup": (2, 12)}),
    # Two chains have no error of the norm, whose read is the one more that three have.
    "chains": (D.local_entropy, {**STEEP, "samples": 2, "warmup": 2}, {"chains": (3, 9)}),
    "grouped draws": (D.flatness_profile, {"sigmas": [0.1, 0.2], "groups": 4}, {"draws": (4, 16)}),
    "profile": (D.flatness_profile, {"sigmas": [0.1, 0.2]}, {"draws": (4, 16)}),
    "examples": (D.gradient_noise, {}, {"chunk": (15, 3)}),
    "looped": (D.gradient_noise, {"vectorize": False, "chunk": 5}, {"examples": (15, 30)}),
    "gram": (D.gradient_noise, {"examples": 20}, {"chunk": (10, 2)}),
}


@pytest.mark.parametrize("name", MORE)
def test_more_work_makes_no_more_reads(name: str) -> None:
    measure, fixed, varied = MORE[name]
    ((argument, values),) = varied.items()
    found = []
    for value in values:
        with Calls() as calls:
            measure(net(), data(), **{**fixed, argument: value})
        found.append(calls)
    assert found[0].waits == found[1].waits
    assert found[0].waits.total() < 40 and found[1].counted.total() > 1.5 * found[0].counted.total()


def test_lanczos_reads_its_small_matrix_every_fourth_product() -> None:
    matrix = torch.diag(torch.linspace(1, 2, 60))
    products = 0

    def multiply(v: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        return v @ matrix

    with Calls() as calls:
        values, *_ = lanczos.extreme_eigenpairs(
            multiply, 60, top=2, tolerance=1e-6, basis_size=20, generator=torch.Generator().manual_seed(0)
        )
    np.testing.assert_allclose(values, [2, 2 - 1 / 59], atol=1e-4)
    assert products > 20
    # A read is the matrix, .cpu() and .numpy(); the basis is cut down by the host's Ritz vectors, and no read.
    assert calls.waits["cpu"] <= -(-products // 4) + products // 20
    assert calls.waits["_local_scalar_dense"] == 0


def test_the_loss_of_every_batch_is_read_at_once() -> None:
    """And which of them is not finite only if the mean is not."""
    found = []
    for batch in (15, 3):
        with Calls() as calls, D.untouched.untouched(module := net()):
            D.surface.LossSurface(module, data(30, batch))
        found.append(calls.waits)
    assert found[0] == found[1]

    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

    batches = [torch.ones(2), torch.full((2,), float("inf")), torch.full((2,), float("nan"))]
    with D.untouched.untouched(module := Bad()):  # noqa: SIM117
        with pytest.raises(ValueError, match="loss must be finite, got inf on batch 1"):
            D.surface.LossSurface(module, batches, loss=lambda m, b: (m.w * b).mean())
