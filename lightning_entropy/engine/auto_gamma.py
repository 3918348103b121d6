"""gamma="auto": the stiffness at which the spring is as strong as the gradient, measured in a loop without it."""

import math
from collections.abc import Sequence

from torch import Tensor

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine.weights import Slot


class GammaMeasurement:
    """Sum the gradients of a loop and compare their mean with how far the loop went.

    The papers' advice, |gamma (x - z)| = |grad f|, as a measurement instead of a search.

    References:
        Chaudhari et al., Entropy-SGD, ICLR 2017, section 4.3.
    """

    def __init__(self) -> None:
        self.count = 0  # gradients summed

    def add(self, slots: Sequence[Slot], scale: Tensor | None) -> None:
        """Add the gradients of a step, which are ``scale`` times too large."""
        self.count += 1
        for slot in slots:
            slot.add_gradient(scale)

    def take(self, slots: Sequence[Slot]) -> float | None:
        """Give gamma and start anew; None where nothing moved, or nothing finite did."""
        gradients = [slot.gradient for slot in slots if slot.gradient is not None]
        count, self.count = self.count, 0
        for slot in slots:
            slot.gradient = None
        if not gradients:
            return None
        distance = F.norm([slot.mean - slot.anchor for slot in slots])
        gamma = (F.norm(gradients) / (count * distance)).item()
        return gamma if 0 < gamma < math.inf else None
