"""What other examples would change of a Hessian's spectrum: its parts on groups of them, and on groups drawn anew."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_entropy.diagnostics.groups import Groups
from lightning_entropy.diagnostics.hessian.lanczos import gauss_quadrature
from lightning_entropy.diagnostics.hessian.result import ByGroup
from lightning_entropy.diagnostics.progress import progress_bar

# Spectra of groups drawn anew, where a dense one is cheap.
_SPECTRA = 16


def by_group_of(groups: Groups, u: Tensor, z: Tensor) -> ByGroup | None:
    """Return u^T H_g u of eigenvectors u, shape (k, P), and tr H_g from probes z, shape (m, P), of each group."""
    if not len(groups) or not len(u) + len(z):
        return None
    curvatures, traces = [], []
    inside = (z @ u.T).double()
    for products in groups.hessian_products(torch.cat([u, z])):
        small = (u @ products[: len(u)].T).double()
        crossed = (products[len(u) :] @ u.T).double()
        forms = (z * products[len(u) :]).double().sum(1) - 2 * (inside * crossed).sum(1)
        forms += ((inside @ small) * inside).sum(1)
        curvatures.append(small.diagonal().cpu().numpy())
        traces.append(float(small.trace() + forms.mean()) if len(z) else np.nan)
    return ByGroup(groups.shares, np.array(curvatures), np.array(traces) if len(z) else None)


def resampled_of(
    groups: Groups, z: Tensor, steps: int, abreast: int, seed: int, progress: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the quadrature of each probe, shape (m, P), on groups of examples drawn anew for it."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    if not len(groups):
        return found
    draws = groups.resampling(len(z), seed)
    rounds = -(-len(z) // abreast) * min(steps, z.shape[1])
    with progress_bar("Hessian density, error", rounds, progress) as bar:
        for start in range(0, len(z), abreast):
            part = slice(start, start + abreast)
            products = partial(groups.resampled_products, counts=draws[part])
            nodes, masses, _ = gauss_quadrature(products, z[part], steps, tick=bar.update)
            found += zip(nodes, masses, strict=True)
    return found


def dense_by_group(
    groups: Groups, values: np.ndarray, vectors: Tensor, seed: int
) -> tuple[ByGroup | None, list[tuple[np.ndarray, np.ndarray]]]:
    """As :func:`by_group_of` with all eigenvectors, and the spectra of matrices of groups drawn anew."""
    if not len(groups):
        return None, []
    eye = torch.eye(len(vectors), dtype=groups.surface.weights.dtype, device=groups.surface.device)
    matrices = [m.double().cpu() for m in groups.hessian_products(eye)]
    curvatures = np.array([(vectors * (m @ vectors)).sum(0).numpy() for m in matrices])
    found = ByGroup(groups.shares, curvatures, np.array([float(m.trace()) for m in matrices]))
    spectra, stacked = [], torch.stack(matrices)
    for counts in groups.resampling(_SPECTRA, seed):
        weights = torch.from_numpy(counts * groups.shares)
        matrix = torch.einsum("g,gij->ij", weights / weights.sum(), stacked)
        spectra.append((torch.linalg.eigvalsh((matrix + matrix.T) / 2).numpy(), np.full(len(values), 1 / len(values))))
    return found, spectra
