"""The loss that the diagnostics measure, a callable of a module and a batch."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_entropy.diagnostics.examples import Batch

Loss = Callable[[nn.Module, Batch], Tensor]


def cross_entropy(module: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy of ``module(x)`` against ``y`` for a batch ``(x, y)`` of inputs and class indices.

    The default loss of the diagnostics: no weight decay, no label smoothing, no auxiliary terms.

    Args:
        module: Maps x to logits, shape (batch, classes, ...).
        batch: A pair (x, y), y of integers.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: If the batch or the output is of another kind.

    Example:
        >>> import torch
        >>> round(cross_entropy(nn.Identity(), (torch.zeros(3, 10), torch.tensor([1, 2, 3]))).item(), 4)  # log 10
        2.3026
    """
    if not (isinstance(batch, list | tuple) and len(batch) == 2):
        raise ValueError(
            f"a batch must be a pair (x, y) for the default loss, got {type(batch).__name__}: "
            "pass loss=, a callable (module, batch) -> scalar"
        )
    x, y = batch
    logits = module(x)
    if not (isinstance(y, Tensor) and isinstance(logits, Tensor)) or y.is_floating_point() or logits.ndim < 2:
        raise ValueError(
            "y must hold class indices and module(x) logits of shape (batch, classes) for the default loss, got "
            f"{kind_of(y)} and {kind_of(logits)}: pass loss=, a callable (module, batch) -> scalar"
        )
    return nn.functional.cross_entropy(logits, y)


def kind_of(value: Any) -> str:
    """Describe a value in an error: dtype and shape of a tensor, else its type."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
