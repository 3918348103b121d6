"""How flat is the minimum, how loud and how round is the noise, does SGD walk in circles.

Each estimator is a function that returns a frozen result with numbers, error bars and ``.plot(ax=None)``; its callback
stands beside it. Needs scipy and matplotlib, the extra ``diagnostics``.
"""

from importlib.util import find_spec

_missing = [name for name in ("scipy", "matplotlib") if find_spec(name) is None]
if _missing:
    raise ImportError(f"lightning_entropy.diagnostics needs {' and '.join(_missing)}: pip install {' '.join(_missing)}")

# The functions local_entropy and gradient_noise stand in folders of their names. Python sets a folder as an attribute
# when it is first imported, which is here, before the function of that name takes its place for good.
from lightning_entropy.diagnostics.estimate import Estimate, GroupValues  # noqa: E402
from lightning_entropy.diagnostics.figures import overview  # noqa: E402
from lightning_entropy.diagnostics.gradient_noise import (  # noqa: E402
    GradientNoise,
    GradientNoiseResult,
    gradient_noise,
)
from lightning_entropy.diagnostics.hessian import HessianResult, HessianSpectrum, hessian_spectrum  # noqa: E402
from lightning_entropy.diagnostics.local_entropy import (  # noqa: E402
    FlatnessProfile,
    LocalEntropy,
    LocalEntropyResult,
    flatness_profile,
    local_entropy,
)
from lightning_entropy.diagnostics.loss import cross_entropy  # noqa: E402
from lightning_entropy.diagnostics.trajectory import (  # noqa: E402
    ProbabilityCurrent,
    Trajectory,
    TrajectoryResult,
    analyse_trajectory,
    probability_current,
)

__all__ = [
    "Estimate",
    "FlatnessProfile",
    "GradientNoise",
    "GradientNoiseResult",
    "GroupValues",
    "HessianResult",
    "HessianSpectrum",
    "LocalEntropy",
    "LocalEntropyResult",
    "ProbabilityCurrent",
    "Trajectory",
    "TrajectoryResult",
    "analyse_trajectory",
    "cross_entropy",
    "flatness_profile",
    "gradient_noise",
    "hessian_spectrum",
    "local_entropy",
    "overview",
    "probability_current",
]
