"""The way in for plain PyTorch."""

from typing import Any

from torch.optim import Optimizer

from lightning_entropy.inner_outer import InnerOuter
from lightning_entropy.outer import OuterFactory
from lightning_entropy.perturbed import PerturbedLoop
from lightning_entropy.relaxation import Relaxation
from lightning_entropy.replicas import ReplicaMean


def relax(
    optimizer: Optimizer,
    relaxation: Relaxation,
    *,
    outer: OuterFactory | None = None,
    replica_mean: ReplicaMean | None = None,
    seed: int | None = None,
    compile: bool = False,
) -> InnerOuter:
    """Attach a relaxation to an optimizer: from now on ``optimizer.step()`` is one inner step.

    Attach when the weights are loaded and on their device; weights loaded later are to be loaded in ``at_anchor()``.

    Args:
        optimizer: any ``torch.optim`` optimizer, or a third party's that runs torch's step hooks.
        relaxation: the method.
        outer: makes the outer optimizer from the list of anchors; None: SGD with the relaxation's ``outer_lr``
            and Nesterov ``outer_momentum``. One given here replaces both.
        replica_mean: mean of a list of tensors over replicas: returns the list, or a callable that waits for it (the
            tensors do not change until it is called). None: one replica.
        seed: of the noise, >= 0; None: ``torch.initial_seed()``. The global random state is neither read nor changed.
        compile: do an inner step in one compiled pass over memory: large float32 parameters, and with plain
            ``torch.optim.SGD`` its update too. The first steps take some seconds more. Same law of the noise, other
            numbers; measured on the CPU.

    Returns:
        The loop.

    Raises:
        TypeError: an argument of another type.
        ValueError: the optimizer has a loop already, or the relaxation cannot work with it.

    Example:
        >>> import torch
        >>> from lightning_entropy import lookahead
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> loop = relax(optimizer, lookahead(inner_steps=2, outer_lr=0.5))
        >>> for _ in range(2):
        ...     w.grad = torch.ones(1)
        ...     optimizer.step()
        >>> w.data  # 3 -> 2 -> 1, then half way back
        tensor([2.])
    """
    return make_loop(optimizer, relaxation, outer=outer, replica_mean=replica_mean, seed=seed, compile=compile)


def make_loop(optimizer: Optimizer, relaxation: Relaxation, **kwargs: Any) -> InnerOuter:
    """Make the loop that a relaxation needs; the arguments are those of :class:`InnerOuter`."""
    kind = PerturbedLoop if isinstance(relaxation, Relaxation) and relaxation.perturb else InnerOuter
    return kind(optimizer, relaxation, **kwargs)
