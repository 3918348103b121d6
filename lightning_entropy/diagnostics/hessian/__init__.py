"""How flat is the minimum: eigenvalues, trace and spectral density of the Hessian of the loss."""

from lightning_entropy.diagnostics.hessian.callback import HessianSpectrum
from lightning_entropy.diagnostics.hessian.estimator import hessian_spectrum
from lightning_entropy.diagnostics.hessian.result import HessianResult

__all__ = ["HessianResult", "HessianSpectrum", "hessian_spectrum"]
