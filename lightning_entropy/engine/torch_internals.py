"""The private names of torch that the engine needs, in one place. Checked against torch 2.6 to 2.14.

``tests/engine/test_torch_internals.py`` fails when one of them changes.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def step_hooks(optimizer: Optimizer) -> list[Callable[..., Any]] | None:
    """Return the hooks before and after an optimizer's step; None where its class runs none."""
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return None
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


def running_steps(optimizer: Optimizer) -> int:
    """Count this optimizer's calls of ``step`` on the stack: frames of torch's wrapper around it."""
    count, frame = 0, sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is optimizer:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written in place, whole or by its part on this rank, which torch counts apart."""
    return tensor._version + (tensor._local_tensor._version if isinstance(tensor, DTensor) else 0)


def splits_last(placement: object) -> bool:
    """Whether a placement splits what the mesh axes after it have left: FSDP2's, of a tensor-parallel parameter."""
    return type(placement).__name__ == "_StridedShard"


def part_shape(tensor: DTensor) -> tuple[int, ...]:
    """Return the shape of this rank's part, without autograd's notice."""
    return tuple(tensor._local_tensor.shape)
