"""The way in for plain PyTorch."""

from typing import Any

from torch.nn import Module
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_entropy.engine.chain import SPRINGS
from lightning_entropy.engine.loop import InnerOuter
from lightning_entropy.engine.outer_rules import OuterFactory, ReplicaMean
from lightning_entropy.methods.pull import Pull
from lightning_entropy.methods.relaxation import Relaxation, check_relaxation


def relax(
    optimizer: Optimizer,
    relaxation: Relaxation,
    *,
    outer: OuterFactory | None = None,
    replica_mean: ReplicaMean | None = None,
    seed: int | None = None,
    compile: bool = False,
    offload_anchor: bool = False,
    module: Module | None = None,
) -> InnerOuter:
    """Attach a relaxation to an optimizer: from now on ``optimizer.step()`` is one inner step.

    Attach when the weights are loaded and on their device; weights loaded later are to be loaded in ``at_anchor()``.

    Args:
        optimizer: any ``torch.optim`` optimizer, or a third party's that runs torch's step hooks.
        relaxation: the method.
        outer: makes the outer optimizer from the list of anchors; None: SGD with the relaxation's ``outer_lr``
            and Nesterov ``outer_momentum``. One given here replaces both.
        replica_mean: mean of a list of tensors over replicas: returns the list, or a callable that waits for it (the
            tensors do not change until it is called); or None for the list, where the mean could not be had: the outer
            step then does without the elastic pull, and a step that all replicas take together is put off to the end
            of the next loop. It is called for one fragment of the weights at a time. None: one replica.
        seed: of the noise, >= 0; None: ``torch.initial_seed()``. The global random state is neither read nor changed.
        compile: do an inner step in one compiled pass over memory: float32 parameters on the CPU and on CUDA, and with
            plain ``torch.optim.SGD`` that has no other step hooks its update too. Building it now takes seconds and,
            for the CPU, a C++ compiler: ``$CXX``, or c++, g++ or clang++; for CUDA, Triton, which torch comes with.
            Same law of the noise, other numbers; sharded parameters are left to torch.
        offload_anchor: x and the outer optimizer's state are in the host's memory (pinned, for CUDA), and on the
            parameters' device only for an outer step and while x is shown; for methods that need them nowhere else:
            ``gamma=0`` and ``average=1``, as Lookahead, local SGD and DiLoCo have. The results are the same. With
            ``elastic_target="anchor"``, ``replica_mean`` is given x there. For parameters on the CPU it gains nothing.
        module: whose parameters they are. Needed where they are sharded (``fully_shard``, a tensor-parallel plan), and
            else without meaning: FSDP2 gathers copies of its weights, which are dropped before weights are written.

    Returns:
        The loop.

    Raises:
        TypeError: an argument of another type.
        ValueError: the optimizer has a loop already, the relaxation cannot work with it or with ``offload_anchor``, or
            sharded parameters without ``module``.
        RuntimeError: ``compile`` without a C++ compiler, or on CUDA a Triton, that works.

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
    return make_loop(
        optimizer,
        relaxation,
        outer=outer,
        replica_mean=replica_mean,
        seed=seed,
        compile=compile,
        offload_anchor=offload_anchor,
        module=module,
    )


def make_loop(optimizer: Optimizer, relaxation: Relaxation, **options: Any) -> InnerOuter:
    """Make the loop that a relaxation needs.

    Args:
        optimizer: the user's.
        relaxation: the method.
        options: the other arguments of :class:`InnerOuter`.

    Returns:
        The loop, attached.

    Raises:
        TypeError: an argument of another type.
        ValueError: the optimizer has a loop already, or the relaxation cannot work with it.
        RuntimeError: ``compile`` without a C++ compiler, or on CUDA a Triton, that works.
    """
    _check(optimizer, relaxation)
    for name in () if relaxation.has_anchor else ("outer", "replica_mean"):
        if options.get(name) is not None:
            raise ValueError(f"{name} has no meaning with perturb=True: there is no outer step, got {options[name]!r}")
    return InnerOuter(optimizer, relaxation, **options)


def _check(optimizer: Optimizer, relaxation: Relaxation) -> None:
    if not isinstance(optimizer, Optimizer):
        kind = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
        hint = ": relax(optimizer, relaxation)" if isinstance(optimizer, Relaxation) else ""
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {kind}{hint}")
    check_relaxation(relaxation)
    by_lr = relaxation.gamma != 0 and not isinstance(relaxation.gamma, Pull)
    uses_lr = relaxation.has_anchor and (by_lr or relaxation.noise != 0)
    if uses_lr and any("lr" not in group for group in optimizer.param_groups):
        raise ValueError("optimizer must have an 'lr' in every param group for a spring or noise, got one without")
    if (name := relaxation.share) is not None:
        raise ValueError(
            f"{name} must count outer steps here, where the length of the training is not known, got a share of it in "
            f"{getattr(relaxation, name)!r}"
        )
    averages = not relaxation.has_anchor and relaxation.inner_steps > 1
    if isinstance(optimizer, SparseAdam) and averages:
        raise ValueError(
            f"inner_steps must be 1 for the heat variant with SparseAdam, which takes no mean of gradients, "
            f"got {relaxation.inner_steps}"
        )
    if isinstance(optimizer, LBFGS):
        if SPRINGS[relaxation.spring].in_gradient:
            raise ValueError(
                f"{relaxation.spring} must be False with LBFGS: its line search needs the loss of its gradient"
            )
        if averages:
            raise ValueError(f"inner_steps must be 1 for the heat variant with LBFGS, got {relaxation.inner_steps}")
