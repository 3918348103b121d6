"""Eigenvalues and spectral densities of a symmetric matrix known by its products with vectors.

Both routines reorthogonalise fully and twice, by two matrix-vector products each, and leave the device to run
ahead: the small projected matrix visits the host once every few products, not once a product.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Maps vectors, shape (k, P), to their products with the matrix, shape (k, P).
Products = Callable[[Tensor], Tensor]

_CHECK_EVERY = 4


def _orthogonalise(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract from ``vector`` (k, P, 1) its part in the rows of ``basis`` (k, j, P), twice; return that part too."""
    inside = basis @ vector
    vector = vector - basis.mT @ inside
    correction = basis @ vector
    return vector - basis.mT @ correction, inside + correction


def _normalise(vector: Tensor, scale: Tensor) -> Tensor:
    """Divide by the norm; zero what is rounding error beside ``scale``: the Krylov space is exhausted."""
    norm = vector.norm(dim=1, keepdim=True)
    tiny = 100 * torch.finfo(vector.dtype).eps * scale
    return torch.where(norm > tiny, vector / norm, 0.0)


def extreme_eigenpairs(
    products: Products,
    size: int,
    *,
    top: int,
    bottom: int = 0,
    tolerance: float = 1e-6,
    max_products: int = 1000,
    basis_size: int = 64,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    r"""Find the largest and smallest eigenvalues by Lanczos with thick restarts (Wu & Simon 2000).

    From an orthonormal basis V of the Krylov space and T = V^T H V, a Ritz pair (theta, V s) has the residual
    r = |H V s - theta V s|, and |theta - lambda| <= min(r, r^2 / gap), gap the distance to the rest of the spectrum
    (Parlett, The Symmetric Eigenvalue Problem, ch. 11), which is taken from the Ritz values. Iteration ends when
    that is below ``tolerance * max |theta|`` for every wanted pair. When the basis is full it is cut down to the
    Ritz vectors nearest to both ends, so memory stays at ``basis_size + 1`` vectors.

    Args:
        products: Multiplies vectors, shape (1, P), by the matrix.
        size: P.
        top: How many of the largest, >= 0.
        bottom: How many of the smallest, >= 0.
        tolerance: Error of an eigenvalue relative to the largest in modulus, > 0.
        max_products: When to stop short of it.
        basis_size: Vectors kept, at least 2 (top + bottom) + 2 and at most P (cut to it).
        generator: Draws the starting vector; its device is where the basis lives.
        dtype: Of the vectors.

    Returns:
        Eigenvalues, descending, shape (k,); their errors by the bound above; unit vectors, shape (k, P). k is
        ``top + bottom``, or P where that is less.

    Example:
        >>> matrix = torch.diag(torch.arange(5.0))
        >>> values, errors, vectors = extreme_eigenpairs(
        ...     lambda v: v @ matrix, 5, top=1, bottom=1, generator=torch.Generator().manual_seed(0))
        >>> values.round(4).tolist(), vectors.abs()[0].argmax().item()
        ([4.0, 0.0], 4)
    """
    top, bottom = min(top, size), min(bottom, max(0, size - top))
    wanted = top + bottom
    limit = min(max(basis_size, 2 * wanted + 2), size)
    device = generator.device
    eps = torch.finfo(dtype).eps

    basis = torch.zeros(1, limit + 1, size, dtype=dtype, device=device)
    projected = torch.zeros(limit + 1, limit + 1, dtype=dtype, device=device)

    def fresh(count: int) -> Tensor:
        """A random direction orthogonal to the first ``count`` vectors of the basis."""
        vector = torch.randn(1, size, 1, generator=generator, dtype=dtype, device=device)
        vector = vector / vector.norm()
        vector, _ = _orthogonalise(vector, basis[:, :count])
        return (vector / vector.norm())[..., 0]

    basis[:, 0] = fresh(0)
    count, checked, done = 0, 0, 0
    found_before = None  # The wanted eigenvalues when the last invariant subspace closed.
    while True:
        vector = products(basis[:, count])[..., None]
        done += 1
        vector, inside = _orthogonalise(vector, basis[:, : count + 1])
        projected[: count + 1, count] = inside[0, :, 0]
        projected[count, : count + 1] = inside[0, :, 0]
        count += 1
        basis[:, count] = _normalise(vector, inside.abs().amax(1, keepdim=True))[..., 0]
        projected[count, count - 1] = vector.norm()
        if count % _CHECK_EVERY and count < limit and done < max_products:
            continue

        small = projected[: count + 1, :count].double().cpu().numpy()
        tiny = 100 * eps * np.abs(small).max()
        coupling = np.diag(small, -1)
        closed = checked + np.flatnonzero(np.abs(coupling[checked:]) <= tiny)
        if len(closed):  # The columns after it came from a zero vector.
            count = int(closed[0]) + 1
            projected[count:], projected[:, count:] = 0.0, 0.0
            small = small[: count + 1, :count]
            small[count] = 0.0
        checked, exhausted = count, count == size

        ritz, coefficients = np.linalg.eigh(small[:count])
        residuals = np.abs(small[count] @ coefficients)
        gaps = np.diff(ritz, prepend=-np.inf, append=np.inf)
        gaps = np.maximum(np.minimum(gaps[:-1], gaps[1:]) - residuals, 1e-300)
        rounding = 32 * eps * np.abs(ritz).max()
        errors = np.minimum(residuals, residuals**2 / gaps) + rounding
        order = np.r_[np.arange(count)[::-1][:top], np.arange(count)[: min(bottom, max(0, count - top))][::-1]]
        allowed = tolerance * np.abs(ritz).max() + rounding
        converged = count >= wanted and bool((errors[order] <= allowed).all())
        if len(closed):
            # The rest of a multiple eigenvalue is not in the Krylov space of the first: look again from a fresh
            # direction until that finds nothing new.
            known, found_before = found_before, ritz[order]
            same = known is not None and len(known) == len(order) and bool((abs(known - ritz[order]) <= allowed).all())
            converged = converged and same
        if converged or exhausted or done >= max_products:
            rotation = torch.from_numpy(coefficients[:, order].T.copy()).to(basis)
            return ritz[order], errors[order], rotation @ basis[0, :count]

        if len(closed):
            basis[:, count] = fresh(count)
        if count == limit:
            spare = (limit - wanted) // 3
            kept = np.r_[0 : bottom + spare, count - top - spare : count]
            rotation = torch.from_numpy(coefficients[:, kept].T.copy()).to(basis)
            following = basis[:, count].clone()
            basis[0, : len(kept)] = rotation @ basis[0, :count]
            count = checked = len(kept)
            basis[:, count] = following
            projected.zero_()
            projected[range(count), range(count)] = torch.from_numpy(ritz[kept]).to(projected)


def gauss_quadrature(
    products: Products, probes: Tensor, steps: int, *, tick: Callable[[], object] = lambda: None
) -> tuple[list[np.ndarray], list[np.ndarray], Tensor]:
    r"""Turn each probe v into the Gauss quadrature of its spectral measure: v^T g(H) v = |v|^2 sum_i w_i g(theta_i).

    ``steps`` of Lanczos from v give a tridiagonal T; the nodes theta are its eigenvalues and the weights the
    squared first components of its eigenvectors (Golub & Welsch 1969), exact for polynomials of degree
    2 steps - 1. Averaged over random probes this is stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017,
    doi:10.1137/16M1104974). The chains run side by side, so that products may share work.

    Args:
        products: Multiplies vectors, shape (k, P), by the matrix.
        probes: Starting vectors v, shape (k, P), k chains. Memory: ``(steps + 2) k P`` numbers.
        steps: Products for each chain, >= 1; at most P are made.
        tick: Called after each round of products.

    Returns:
        For each probe its nodes, ascending, and its weights, which sum to 1; and H v, shape (k, P).

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 3.0]))
        >>> nodes, weights, _ = gauss_quadrature(lambda v: v @ matrix, torch.ones(1, 2), 2)
        >>> nodes[0].round(5).tolist(), weights[0].round(5).tolist()      # exact: both eigenvalues, half each
        ([1.0, 3.0], [0.5, 0.5])
    """
    from scipy.linalg import eigh_tridiagonal

    chains, size = probes.shape
    steps = min(steps, size)
    norms = probes.norm(dim=1, keepdim=True)
    basis = torch.zeros(chains, steps, size, dtype=probes.dtype, device=probes.device)
    diagonal = torch.zeros(chains, steps, dtype=probes.dtype, device=probes.device)
    coupling = torch.zeros_like(diagonal)
    first = torch.empty_like(probes)

    current = (probes / norms)[..., None]
    for j in range(steps):
        basis[:, j] = current[..., 0]
        product = products(current[..., 0])
        if j == 0:
            first = product * norms
        vector, inside = _orthogonalise(product[..., None], basis[:, : j + 1])
        diagonal[:, j] = inside[:, j, 0]
        scale = inside.abs().amax(1, keepdim=True)
        current = _normalise(vector, scale)
        coupling[:, j] = (vector * current).sum(1)[:, 0]
        tick()

    nodes, weights = [], []
    for a, b in zip(diagonal.double().cpu().numpy(), coupling.double().cpu().numpy(), strict=True):
        ended = np.flatnonzero(b == 0)
        used = int(ended[0]) + 1 if len(ended) else steps
        theta, vectors = eigh_tridiagonal(a[:used], b[: used - 1])
        nodes.append(theta)
        weights.append(vectors[0] ** 2)
    return nodes, weights, first
