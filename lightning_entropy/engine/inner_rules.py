"""Which inner rules a relaxation consists of."""

from collections.abc import Callable, Collection

from torch import Tensor

from lightning_entropy.engine.chain import Chain
from lightning_entropy.engine.native.step import NativeStep
from lightning_entropy.engine.perturbation import MeanPerturbation, Perturbation
from lightning_entropy.engine.step import InnerRule
from lightning_entropy.engine.weights import Weights
from lightning_entropy.methods.relaxation import Relaxation

# In the order in which they act: whether a relaxation has the rule, and what makes it of the arguments of inner_rules.
_RULES: list[tuple[Callable[[Relaxation], bool], Callable[..., InnerRule]]] = [
    (lambda relaxation: relaxation.perturb, MeanPerturbation),
    (lambda relaxation: not relaxation.perturb and relaxation.width != 0, Perturbation),
    (lambda relaxation: not relaxation.perturb, lambda relaxation, weights, native, _: Chain(relaxation, native)),
]


def inner_rules(
    relaxation: Relaxation, weights: Weights, native: NativeStep | None, self_writing: Collection[Tensor]
) -> list[InnerRule]:
    """Make the inner rules of a relaxation.

    Args:
        relaxation: the method.
        weights: of the loop.
        native: does a step in one pass over memory; None: tensor by tensor.
        self_writing: parameters that their module's forward pass writes into.

    Returns:
        One or more, in the order in which they act.
    """
    return [make(relaxation, weights, native, self_writing) for has, make in _RULES if has(relaxation)]
