"""Parts of a module that reentrant activation checkpointing keeps from being differentiated more than by backward()."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointFunction


@contextmanager
def not_reentrant(module: nn.Module) -> Iterator[None]:
    """Raise an error of ours where the module runs a part under reentrant activation checkpointing.

    That runs the part without a graph, makes one in ``backward()`` alone and adds to ``.grad`` there: torch refuses it
    under ``torch.autograd.grad``, of which every gradient and Hessian here is made. If no input of the part needs a
    gradient it even yields none for its weights, with a mere warning.

    Args:
        module: Called within the context.

    Yields:
        Nothing.

    Raises:
        ValueError: If it does.
    """
    names = {id(part): name for name, part in module.named_modules()}

    def look(part: nn.Module, *_: Any) -> None:
        frames = traceback.walk_stack(None)
        if any(frame.f_code is CheckpointFunction.forward.__code__ for frame, _ in frames):
            raise _error(f"its part {names[id(part)]!r}, {type(part).__name__}," if names[id(part)] else "it")

    handles = [part.register_forward_pre_hook(look) for part in module.modules()]
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" in str(error):  # what was checkpointed is a function, and no module
            raise _error("a part of it") from error
        raise
    finally:
        for handle in handles:
            handle.remove()


def _error(part: str) -> ValueError:
    return ValueError(
        f"module must be differentiable by torch.autograd.grad, and {part} runs under reentrant activation "
        "checkpointing, which knows backward() alone: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
    )
