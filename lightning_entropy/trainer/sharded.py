"""A callback's state in the checkpoints of Lightning's ``ModelParallelStrategy``, whose parameters are shards.

A checkpoint in one file has whole tensors, gathered one by one on the first rank. One that is a folder is written by
torch's distributed checkpoint, a part by every rank, and any number of ranks can read it: but Lightning puts only the
module and the optimizers in there, and the first rank's callbacks in a file beside. So tensors of shards go along with
the optimizers, as one more of them, and in the file stand tensors without numbers in their places.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from lightning_entropy.engine.shards import local, mapped, whole
from lightning_entropy.trainer.lightning_internals import saves_a_folder

PLACE = "sharded"  # key in a state: which of the checkpoint's optimizers its tensors are


@torch.no_grad()
def put_away(trainer: Trainer, checkpoint: dict[str, Any], key: str) -> None:
    """Make a callback's state in a checkpoint one that can be saved. A collective where it has shards.

    Args:
        trainer: that saves.
        checkpoint: with its callbacks' and its optimizers' states.
        key: of the callback.
    """
    states = checkpoint.get("callbacks", {})
    if not isinstance(trainer.strategy, ModelParallelStrategy) or not states.get(key):
        return
    if not saves_a_folder(trainer.strategy):
        keeps = trainer.is_global_zero
        states[key] = mapped(states[key], lambda _, t: _gathered(t, keeps) if isinstance(t, DTensor) else t)
        return
    parts = {path: t for path, t in _tensors(states[key]) if isinstance(t, DTensor)}
    if not parts:
        return
    optimizers = checkpoint.setdefault("optimizer_states", [])
    states[key] = mapped(
        states[key], lambda path, t: torch.empty(t.shape, dtype=t.dtype, device="meta") if path in parts else t
    ) | {PLACE: len(optimizers)}
    optimizers.append({key: parts})


def _gathered(tensor: DTensor, keeps: bool) -> Tensor:
    full = tensor.full_tensor()
    return full.cpu() if keeps else full.new_empty(0)


@torch.no_grad()
def fetch(path: Any, state: Mapping[str, Any], key: str, params: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a state with the tensors that :func:`put_away` has left in the checkpoint. A collective.

    Args:
        path: of the checkpoint, the same on every rank.
        state: as it was loaded; one without tensors elsewhere is returned as it is.
        key: of the callback.
        params: the module's, by name: as they are placed now, so are their tensors.
    """
    if PLACE not in state:
        return dict(state)
    found = {at: _room(t, at, params) for at, t in _tensors(state) if t.is_meta}
    dcp.load({f"optimizer_{state[PLACE]}": {key: found}}, checkpoint_id=path)
    filled = mapped(state, lambda at, t: found.get(at, t))
    return {k: v for k, v in filled.items() if k != PLACE}


def _room(like: Tensor, path: str, params: Mapping[str, Tensor]) -> Tensor:
    """Return an empty tensor for one that is without numbers, placed as its parameter is."""
    named = [params[part] for part in path.split("/") if part in params]
    if not named or named[0].shape != like.shape:
        return torch.empty(like.shape, dtype=like.dtype)
    return whole(torch.empty_like(local(named[0]), dtype=like.dtype), named[0])


def _tensors(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state, each with its keys."""
    if isinstance(state, Tensor):
        yield path, state
    pairs = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list) else ()
    for name, value in pairs:
        yield from _tensors(value, f"{path}/{name}")
