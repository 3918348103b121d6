"""What the outer step asks the replicas for: a mean over them, of what, and what is done with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OuterTarget:
    """The quantity whose mean over replicas an outer step takes, and three facts about it.

    Attributes:
        of: computes it from x and z, arrays of any library.
        early: it is known when a loop begins, so that the mean can travel while the inner steps run.
        near: it changes little from one outer step to the next, so that its differences are worth compressing.
        common: every replica steps along the mean, x <- outer(x, mean); otherwise each is pulled toward it,
            x <- outer(x, x - z + rho (x - mean)).
    """

    of: Callable[[Any, Any], Any]
    early: bool
    near: bool
    common: bool


def _anchor(x: Any, z: Any) -> Any:
    return x


def _average(x: Any, z: Any) -> Any:
    return z


def _pseudo_gradient(x: Any, z: Any) -> Any:
    return x - z


# By the value of Relaxation.elastic_target. The first: the paper of Parle; the second: its research code; the third:
# local SGD and DiLoCo.
OUTER_TARGETS: dict[str, OuterTarget] = {
    "anchor": OuterTarget(_anchor, early=True, near=True, common=False),
    "average": OuterTarget(_average, early=False, near=True, common=False),
    "pseudo_gradient": OuterTarget(_pseudo_gradient, early=False, near=False, common=True),
}
