"""How flat is the minimum: eigenvalues, trace and spectral density of the Hessian of the loss."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lightning_entropy.diagnostics.estimate import Estimate
from lightning_entropy.diagnostics.examples import Batch, BatchDim, Examples
from lightning_entropy.diagnostics.groups import Groups
from lightning_entropy.diagnostics.hessian.by_group import by_group_of, dense_by_group, resampled_of
from lightning_entropy.diagnostics.hessian.density import density_of
from lightning_entropy.diagnostics.hessian.lanczos import extreme_eigenpairs, gauss_quadrature
from lightning_entropy.diagnostics.hessian.result import ByGroup, HessianResult
from lightning_entropy.diagnostics.loss import Loss
from lightning_entropy.diagnostics.progress import progress_bar
from lightning_entropy.diagnostics.surface import LossSurface
from lightning_entropy.diagnostics.untouched import untouched

_BASIS = 200


def hessian_spectrum(
    module: nn.Module,
    data: Iterable[Batch],
    *,
    loss: Loss | None = None,
    top: int = 5,
    bottom: int = 1,
    probes: int = 8,
    steps: int = 40,
    sigma: float | None = None,
    tolerance: float = 1e-4,
    products: int | None = None,
    dense_limit: int = 1000,
    memory: float = 8.0,
    examples: Examples = None,
    batch_dim: BatchDim = None,
    mode: str = "eval",
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
    transfer: Callable[[Batch], Batch] | None = None,
    progress: bool = False,
    groups: int = 0,
) -> HessianResult:
    r"""Measure the Hessian of f(x) = mean loss: extreme eigenvalues, tr H and the density of eigenvalues.

    Extreme eigenvalues by Lanczos (:func:`~lightning_entropy.diagnostics.hessian.lanczos.extreme_eigenpairs`). Then
    from Rademacher probes z, with U the eigenvectors found and Pi = I - U U^T,

        tr H = sum u^T H u + E (Pi z)^T H (Pi z)        Hutchinson (1990), deflated as in Hutch++ (Meyer et al. 2021)

    so that the outliers, which carry most of the variance, are summed exactly; and the density by stochastic
    Lanczos quadrature from the same probes (Ghorbani et al. 2019, arXiv:1901.10159). The trace costs no product
    beyond the density's; ``steps=1`` gives the trace alone, ``probes=0`` the eigenvalues alone.

    Without ``groups`` the numbers are those of these examples, and error bars are of the probes. With them, examples
    stand for the population that they were drawn from. An eigenvalue with eigenvector u is the mean over groups g of
    u^T H_g u, to first order what other examples change of it, and the trace that of tr H_g; the groups' scatter is
    their standard error. The density's is told from groups drawn anew with replacement, a draw a probe, beside the
    same probe on all of them (a paired bootstrap), which takes as many products again as the density.

    Args:
        module: The network, at the weights to measure.
        data: A loader or an iterable of batches.
        loss: ``(module, batch) -> scalar``, a mean over the batch. None: cross entropy.
        top: How many of the largest eigenvalues, >= 0.
        bottom: How many of the smallest, >= 0.
        probes: Random probes for trace and density: 0, or >= 2 for an error bar.
        steps: Lanczos steps of each probe, >= 1: the density resolves about range / steps.
        sigma: Smoothing of the density, > 0, loss/weight^2. None: 1 % of the range of the spectrum.
        tolerance: Error of the extreme eigenvalues relative to the largest in modulus, > 0.
        products: The most Hessian-vector products for the extreme eigenvalues, >= 1; where they are spent before
            ``tolerance`` is reached, the errors say how far they came. None: 20 for each eigenvalue, and at least 300.
        dense_limit: With no more weights than this, build the matrix and compute all eigenvalues.
        memory: GiB for Lanczos vectors. Each chain needs ``steps + 4`` vectors of P numbers. A batch's graph comes on
            top: where there is no memory for it, batches are cut in half in eval mode, with a warning.
        examples: How many examples of ``data``; or a callable from a batch to its number of them, and all are taken.
            None: all, counted by the tensors' sizes.
        batch_dim: Dimension of the tensors that counts examples, or a callable from a batch to it. None: that of the
            one size that they share.
        mode: "eval" or "train" for BatchNorm and dropout.
        seed: Of probes, examples and dropout.
        state: Weights and buffers by name, in place of the module's own.
        transfer: Moves a batch to the device. None: a plain copy.
        progress: Show a bar when it takes long.
        groups: Of examples, for the error that the choice of examples makes: 0, or >= 2. There are fewer where there is
            less to divide; in train mode they are of whole batches.

    Returns:
        The numbers, with error bars; see :class:`HessianResult`.

    Raises:
        ValueError: If an argument is out of range, the data is empty, nothing is trainable, the loss is not a finite
            scalar, or ``memory`` does not hold one chain.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)                   # f = mean (w . x)^2 / 2, so H = mean x x^T
        >>> data = [torch.tensor([[2.0, 0.0], [0.0, 1.0]])]
        >>> result = hessian_spectrum(net, data, loss=lambda m, x: m(x).square().mean() / 2)
        >>> result.eigenvalues.tolist(), result.trace.value
        ([2.0, 0.5], 2.5)
    """
    for name, count in (("top", top), ("bottom", bottom), ("dense_limit", dense_limit)):
        if count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}")
    if products is not None and products < 1:
        raise ValueError(f"products must be None or at least 1, got {products}")
    if probes < 0 or probes == 1:
        raise ValueError(f"probes must be 0 or at least 2, got {probes}")
    if groups < 0 or groups == 1:
        raise ValueError(f"groups must be 0 or at least 2, got {groups}")
    for name, number in (("steps", steps), ("tolerance", tolerance), ("memory", memory), ("sigma", sigma or 1.0)):
        if number <= 0:
            raise ValueError(f"{name} must be positive, got {number}")

    with untouched(module, mode, seed):
        surface = LossSurface(
            module,
            data,
            loss=loss,
            examples=examples,
            batch_dim=batch_dim,
            mode=mode,
            seed=seed,
            state=state,
            transfer=transfer,
        )
        size = len(surface)
        divided = Groups(surface, groups)
        if size <= dense_limit:
            return _dense(surface, divided, sigma, progress)
        gib = size * surface.weights.element_size() / 2**30
        vectors = int(memory / gib)
        needed = max(2 * (top + bottom) + 6 if top + bottom else 0, min(steps, size) + 4 if probes else 0)
        if vectors < needed:
            raise ValueError(
                f"memory must be at least {needed * gib:.3g} GiB for {needed} vectors of {size:,} weights, got {memory}"
            )
        most = products or max(300, 20 * (top + bottom))
        return _iterative(surface, divided, top, bottom, probes, steps, sigma, tolerance, most, vectors, seed, progress)


def _iterative(
    surface: LossSurface,
    groups: Groups,
    top: int,
    bottom: int,
    probes: int,
    steps: int,
    sigma: float | None,
    tolerance: float,
    most: int,
    vectors: int,
    seed: int,
    progress: bool,
) -> HessianResult:
    size, x = len(surface), surface.weights
    generator = torch.Generator(surface.device).manual_seed(seed)
    # Chains run abreast only where they can share a batch's gradient graph.
    abreast = 1 if len(surface.batches) == 1 else max(1, min(probes, vectors // (min(steps, size) + 4)))

    values, errors = np.empty(0), np.empty(0)
    eigenvectors = x.new_empty(0, size)
    if top + bottom:
        with progress_bar("Hessian eigenvalues", most, progress) as bar:

            def products(v: Tensor) -> Tensor:
                bar.update()
                return surface.hessian_products(x, v)

            values, errors, eigenvectors = extreme_eigenpairs(
                products,
                size,
                top=top,
                bottom=bottom,
                tolerance=tolerance,
                max_products=most,
                basis_size=min(_BASIS + 2 * (top + bottom), vectors - 4),
                generator=generator,
                dtype=x.dtype,
            )

    nodes: list[np.ndarray] = []
    masses: list[np.ndarray] = []
    forms: list[Tensor] = []
    drawn: list[Tensor] = []
    theta = torch.from_numpy(values).to(x)
    with progress_bar("Hessian density", -(-probes // abreast) * min(steps, size), progress) as bar:
        for start in range(0, probes, abreast):
            shape = min(abreast, probes - start), size
            z = torch.randint(0, 2, shape, generator=generator, device=x.device).to(x.dtype).mul_(2).sub_(1)
            theirs, weights, hz = gauss_quadrature(lambda v: surface.hessian_products(x, v), z, steps, tick=bar.update)
            nodes += theirs
            masses += weights
            drawn.append(z)
            inside, crossed = z @ eigenvectors.T, hz @ eigenvectors.T
            forms.append((z * hz).sum(1) - 2 * (inside * crossed).sum(1) + (inside**2 * theta).sum(1))
    trace = None
    if probes:
        rest = Estimate.of(torch.cat(forms))
        trace = Estimate(rest.value + float(values.sum()), rest.stderr, rest.dof)
    z = torch.cat(drawn) if drawn else x.new_empty(0, size)
    del drawn
    by_group = by_group_of(groups, eigenvectors, z)
    resampled = resampled_of(groups, z, steps, max(1, vectors // (min(steps, size) + 4)), seed, progress)
    return _result(surface, values, errors, trace, nodes, masses, sigma, by_group, resampled, exact=False)


def _dense(surface: LossSurface, groups: Groups, sigma: float | None, progress: bool) -> HessianResult:
    size, x = len(surface), surface.weights
    matrix = torch.empty(size, size, dtype=torch.float64)
    block = 64
    with progress_bar("Hessian, dense", -(-size // block), progress) as bar:
        for start in range(0, size, block):
            rows = torch.zeros(min(block, size - start), size, dtype=x.dtype, device=x.device)
            rows[range(len(rows)), range(start, start + len(rows))] = 1
            matrix[start : start + len(rows)] = surface.hessian_products(x, rows)
            bar.update()
    ascending, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = ascending.numpy()[::-1].copy()
    errors = np.full(size, torch.finfo(x.dtype).eps * np.abs(values).max())
    trace = Estimate(float(values.sum()))
    masses = np.full(size, 1 / size)
    by_group, spectra = dense_by_group(groups, values, vectors.flip(1), surface.seed)
    return _result(surface, values, errors, trace, [values[::-1]], [masses], sigma, by_group, spectra, exact=True)


def _result(
    surface: LossSurface,
    values: np.ndarray,
    errors: np.ndarray,
    trace: Estimate | None,
    nodes: list[np.ndarray],
    masses: list[np.ndarray],
    sigma: float | None,
    by_group: ByGroup | None,
    resampled: list[tuple[np.ndarray, np.ndarray]],
    *,
    exact: bool,
) -> HessianResult:
    grid, density, density_errors, width = density_of(nodes, masses, sigma, exact=exact, resampled=resampled)
    return HessianResult(
        weights=len(surface),
        examples=surface.examples,
        mode=surface.mode,
        loss=surface.value,
        eigenvalues=values,
        eigenvalue_errors=errors,
        trace=trace,
        grid=grid,
        density=density,
        density_errors=density_errors,
        sigma=width,
        nodes=tuple(nodes),
        masses=tuple(masses),
        exact=exact,
        by_group=by_group,
        resampled=tuple(resampled),
    )
