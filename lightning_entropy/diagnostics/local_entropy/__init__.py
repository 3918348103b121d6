"""How wide is the valley: local entropy, its gradient, and the loss at random points around the minimum."""

from lightning_entropy.diagnostics.local_entropy.callback import LocalEntropy
from lightning_entropy.diagnostics.local_entropy.estimator import local_entropy
from lightning_entropy.diagnostics.local_entropy.flatness import FlatnessProfile, flatness_profile
from lightning_entropy.diagnostics.local_entropy.result import LocalEntropyResult

__all__ = ["FlatnessProfile", "LocalEntropy", "LocalEntropyResult", "flatness_profile", "local_entropy"]
