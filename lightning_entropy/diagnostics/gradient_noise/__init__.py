"""How loud and how round is the noise of SGD: the diffusion matrix of per-example gradients."""

from lightning_entropy.diagnostics.gradient_noise.callback import GradientNoise
from lightning_entropy.diagnostics.gradient_noise.estimator import gradient_noise
from lightning_entropy.diagnostics.gradient_noise.result import GradientNoiseResult

__all__ = ["GradientNoise", "GradientNoiseResult", "gradient_noise"]
