"""Reading a checkpoint without running code of its own, and what is said where its weights are another module's."""

import pickle
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_entropy.diagnostics.report.names import Refused, said

_KEYS = "Missing", "Unexpected"


def read(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint without running code of its own.

    Raises:
        Refused: It is none.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
        reason = said(error)
        if "weights_only" in reason or "Unsupported" in reason:
            reason = "it holds objects of classes, which reading would run code of: save plain hyper-parameters"
        raise Refused(f"{path} must be a checkpoint that the Trainer has saved, got {reason[:300]}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise Refused(f"{path} must be a checkpoint that the Trainer has saved, got a file without 'state_dict'")
    return checkpoint


def fill(module: pl.LightningModule, weights: dict[str, Any], path: Path, name: str) -> None:
    """Load the weights of a checkpoint.

    Raises:
        Refused: They are another module's.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise other_weights(error, path, name) from None


def other_weights(error: RuntimeError, path: Path, name: str) -> Exception:
    """Return a sentence on weights that do not fit; another error is returned as it is."""
    words = str(error)
    if "loading state_dict" not in words:
        return error
    missing, unknown = (
        re.search(rf"{kind} key\(s\) in state_dict: (.*)\.", words) for kind in ("Missing", "Unexpected")
    )
    other = re.search(r"size mismatch for (\S+): .*?(\[[\d, ]*\]).*?(\[[\d, ]*\])", words)
    facts = []
    if missing:
        facts.append(f"it lacks {_some(missing[1])}")
    if unknown:
        facts.append(f"it has {_some(unknown[1])}, which the module has not")
    if other:
        facts.append(f"its {other[1]} has the shape {other[2]}, the module's {other[3]}")
    return Refused(
        f"{path} must be a checkpoint of {name}, made with the same settings, got other weights: {'; '.join(facts)}. "
        "Name its class with --module, its settings with --module.NAME=VALUE"
    )


def _some(names: str) -> str:
    each = names.replace('"', "").split(", ")
    return ", ".join(each[:3]) + (f" and {len(each) - 3} more" if len(each) > 3 else "")
