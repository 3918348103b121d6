import numpy as np
import pytest
import torch

from lightning_entropy.diagnostics.hessian.lanczos import extreme_eigenpairs, gauss_quadrature


def symmetric(size, seed):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("size", [5, 60, 300])
def test_lanczos_restarts_within_its_memory_and_error_bound(size):
    for seed in range(5):
        matrix = symmetric(size, seed)
        dense = np.linalg.eigvalsh(matrix.numpy())[::-1]
        values, errors, vectors = extreme_eigenpairs(
            lambda v, m=matrix: v @ m,
            size,
            top=3,
            bottom=2,
            tolerance=1e-8,
            basis_size=16,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        wanted = np.r_[dense[:3], dense[-2:]]
        np.testing.assert_allclose(values, wanted, atol=1e-6)
        assert (np.abs(values - wanted) <= errors).all()
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(5, dtype=torch.float64))


def test_lanczos_finds_multiple_eigenvalues():
    rotation, _ = torch.linalg.qr(symmetric(40, 0))
    diagonal = torch.zeros(40, dtype=torch.float64)
    diagonal[:3], diagonal[3:5] = 5.0, -2.0
    matrix = rotation @ torch.diag(diagonal) @ rotation.T
    values, _, _ = extreme_eigenpairs(
        lambda v: v @ matrix, 40, top=4, bottom=2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    np.testing.assert_allclose(values, [5, 5, 5, 0, -2, -2], atol=1e-9)


def test_quadrature_is_exact_for_polynomials():
    matrix, probe = symmetric(30, 3), torch.randn(1, 30, dtype=torch.float64)
    (nodes,), (masses,), _ = gauss_quadrature(lambda v: v @ matrix, probe, 4)
    for power in range(8):  # degree 2 * 4 - 1 = 7
        want = (probe @ torch.linalg.matrix_power(matrix, power) @ probe.T).item() / probe.square().sum().item()
        assert (masses * nodes**power).sum() == pytest.approx(want, rel=1e-10)


def test_chains_abreast_equal_single_chains():
    matrix = symmetric(30, 4)
    probes = torch.randn(3, 30, dtype=torch.float64)
    nodes, masses, _ = gauss_quadrature(lambda v: v @ matrix, probes, 6)
    for i in range(3):
        (one,), (mass,), _ = gauss_quadrature(lambda v: v @ matrix, probes[i : i + 1], 6)
        np.testing.assert_allclose(one, nodes[i], atol=1e-10)
        np.testing.assert_allclose(mass, masses[i], atol=1e-10)
