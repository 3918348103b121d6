"""The loss that a command line asks for, tried on a few examples before anything is measured."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_entropy.diagnostics.examples import Batch
from lightning_entropy.diagnostics.loss import Loss, kind_of
from lightning_entropy.diagnostics.report.findings import Subject
from lightning_entropy.diagnostics.report.names import Refused, find, said

OWN = "training_step"
_FUNCTION = "--loss train.py:function, which takes (module, batch) and returns a scalar"
_OTHERS = f"--loss {OWN} for the module's own, or {_FUNCTION}"


def loss_of(name: str | None) -> Loss | None:
    """Return the loss of a name: None for cross entropy, ``training_step`` for the module's own.

    Raises:
        Refused: It is not there, or nothing to call.
    """
    if name is None:
        return None
    if name == OWN:
        return training_loss
    loss: Any = find("--loss", name)
    if not callable(loss) or isinstance(loss, type):
        kind = f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
        raise Refused(f"--loss must be a callable (module, batch) -> scalar, got {name}, {kind}")
    return cast("Loss", loss)


def training_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Return what ``module.training_step(batch, 0)`` returns, or its item "loss".

    Raises:
        ValueError: It returns no loss, as with manual optimization.
    """
    found: Any = module.training_step(batch, 0)  # type: ignore[operator]
    found = found.get("loss") if isinstance(found, dict) else found
    if found is None:
        raise ValueError("training_step returns no loss, as with manual optimization")
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Let a module log without a Trainer: what it logs goes nowhere, and Lightning need not say so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*You are trying to `self\.log\(\)` but")
        yield


def check_loss(subject: Subject, name: str | None) -> None:
    """Evaluate the loss of a few examples.

    Args:
        subject: Whose loss it is.
        name: Of the loss on the command line.

    Raises:
        Refused: That cannot be done; it says which ``--loss`` might.
    """

    def call(loss: Loss, module: pl.LightningModule, batch: Batch) -> None:
        try:
            with torch.no_grad():
                value: Any = loss(module, batch)
        except Exception as error:
            raise Refused(_failed(name, module, batch, error)) from None
        if not isinstance(value, Tensor) or value.ndim:
            asked = "must be" if name is None else f"{name} must return"
            raise Refused(f"--loss {asked} a scalar tensor, a mean over the batch, got {kind_of(value)}")

    subject.try_loss(call)


def _failed(name: str | None, module: pl.LightningModule, batch: Batch, error: Exception) -> str:
    reason = re.sub(r":? *pass loss=.*", "", said(error))
    if isinstance(error, NotImplementedError) and "forward" in reason:
        reason = "it has no forward"
    kind = f"{type(module).__name__} on a batch that is {_kind(batch)}"
    if name is None:
        ours = "the loss must be given with --loss where it is not the cross entropy of module(x) and y"
        return f"{ours}, which has failed for {kind}: {reason}; give {_OTHERS}"
    return f"--loss {name} has failed for {kind}: {reason}; give {_FUNCTION if name == OWN else _OTHERS}"


def _kind(batch: Any) -> str:
    if isinstance(batch, dict):
        return f"a dict of {', '.join(map(str, list(batch)[:6]))}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {', '.join(kind_of(part) for part in batch[:4])}"
    return kind_of(batch)
