r"""The spring said by what it does: how much of a loop's path it takes back."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from lightning_entropy.methods.schedules import Scoping, Starting, Warmup, Widening, check_ends
from lightning_entropy.methods.validation import Rule, check_integer, check_number

_SHARE: Rule = ("in [0, 1)", lambda v: 0 <= v < 1)


@dataclass(frozen=True)
class Pull:
    r"""A gamma that takes back a given share of a loop's path, at any learning rate and with any optimizer.

    A loop of L updates u, all alike, would end at x + L u. With the implicit spring y <- (y + u + k x) / (1 + k) after
    each, it ends at x + u (1 - (1 + k)^-L) / k, so what the spring takes back is the share

        s = 1 - (1 - (1 + k)^-L) / (L k),

    which is (L + 1) k / 2 while that is small, and 1 - 1 / (L k) when y hardly moves. ``Pull(s)`` is the spring whose
    k, the same for every weight, has this s: gamma = k / lr at the learning rate in force. (gamma = 0.03 at lr = 0.1
    and L = 20 is k = 0.003: 3 % of the path.) A path with turns is shorter, and so is the share of it that a spring
    holds back; a running mean (``average``) then takes a part of what is left.

    What to try first: 0.5. Below 0.1 one sees nothing; well above 0.9 y hardly leaves x.

    Args:
        share: s, in [0, 1); or a callable of the outer step t, such as :class:`Warmup`.

    Raises:
        ValueError: a share outside its range.
        TypeError: something that is no number.

    Example:
        >>> Pull(0.5).stiffness(0, inner_steps=1)  # y <- (y + u + x) / 2
        1.0
    """

    share: float | Scoping | Widening | Warmup | Starting | Callable[[int], float]

    def __post_init__(self) -> None:
        if not callable(self.share):
            check_number("share", self.share, _SHARE)
        check_ends("share", self.share, _SHARE)

    def stiffness(self, t: int, *, inner_steps: int) -> float:
        """Return k at outer step t.

        Args:
            t: outer step, >= 0.
            inner_steps: L, >= 1.

        Raises:
            ValueError: a share outside its range.
            TypeError: something that is no number.
        """
        if callable(self.share):
            return stiffness_of(check_number(f"share(t={t})", self.share(t), _SHARE), inner_steps)
        return stiffness_of(float(self.share), inner_steps)


def share_of(stiffness: float, inner_steps: int) -> float:
    """Return s = 1 - (1 - (1 + k)^-L) / (L k), the share of a straight path that the spring takes back.

    Args:
        stiffness: k, > 0.
        inner_steps: L, >= 1.

    Example:
        >>> share_of(1.0, 2)  # u/2 after one step, 3u/4 after two, in the place of 2u
        0.625
    """
    return 1 + math.expm1(-inner_steps * math.log1p(stiffness)) / (inner_steps * stiffness)


@functools.lru_cache(maxsize=64)
def stiffness_of(share: float, inner_steps: int) -> float:
    """Return the k with :func:`share_of` (k, L) = s, by bisection.

    Args:
        share: s, in [0, 1).
        inner_steps: L, >= 1.
    """
    check_integer("inner_steps", inner_steps, 1)
    if share == 0:
        return 0.0
    # s is at most (L + 1) k / 2, and at least 1 - 1 / (L k).
    low, high = 2 * share / (inner_steps + 1), 1 / (inner_steps * (1 - share))
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return high
        low, high = (middle, high) if share_of(middle, inner_steps) < share else (low, middle)
