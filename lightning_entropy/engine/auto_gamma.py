"""gamma="auto": the stiffness at which the spring is as strong as the gradient, measured in a loop without it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine.weight import Weight, add_gradients


class GammaMeasurement:
    """Sum the gradients of a loop and compare their mean with how far the loop went.

    The papers' advice, |gamma (x - z)| = |grad f|, as a measurement instead of a search.

    References:
        Chaudhari et al., Entropy-SGD, ICLR 2017, section 4.3.
    """

    def __init__(self) -> None:
        self.count = 0  # gradients summed

    def add(self, weights: Sequence[Weight], scale: Tensor | None) -> None:
        """Add the gradients of a step, which are ``scale`` times too large."""
        self.count += 1
        add_gradients(weights, scale)

    def take(self, weights: Sequence[Weight]) -> float | None:
        """Return the measured gamma and reset; None if no weight moved or the result is not finite."""
        having = [w.param for w in weights if w.gradient is not None]
        gradients = [w.gradient for w in weights if w.gradient is not None]
        count, self.count = self.count, 0
        for w in weights:
            w.gradient = None
        if not gradients:
            return None
        steps = torch._foreach_sub([w.mean for w in weights], [w.anchor for w in weights])
        distance = F.norm(steps, [w.param for w in weights])
        gamma = (F.norm(gradients, having) / (count * distance)).item()
        return gamma if 0 < gamma < math.inf else None
