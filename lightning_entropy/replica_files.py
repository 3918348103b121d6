"""What belongs to one replica, in a file of its own beside the checkpoint: ``<file>.replicas/<r>.pt``.

A save is whole or absent. The replicas write their files under a provisional name that carries the save's token, then
the checkpoint with the same token replaces the old one, and then the files take their own names. A crash before the
replacement leaves the old checkpoint and the old files; one after it leaves the new ones, some still provisional.
"""

import os
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

KEY = "elastic_replicas"  # in the main checkpoint: replicas, token, and where the loops stand


class ReplicaFileError(RuntimeError):
    """A replica's file cannot be read, or belongs to another checkpoint."""


def folder(checkpoint: Any) -> str:
    """Give the folder of a checkpoint's replica files."""
    return f"{os.fspath(checkpoint)}.replicas"


def is_local(path: Any) -> bool:
    """Whether files there can be renamed in one step."""
    return "://" not in str(path)


def save_whole(io: CheckpointIO, content: dict[str, Any], path: Any, storage_options: Any = None) -> None:
    """Write a checkpoint so that at every moment the old one or the new one is there, never a part.

    Args:
        io: writes it. One that is not Lightning's own (asynchronous, remote) keeps its own promises.
        content: the checkpoint.
        path: where to.
        storage_options: for ``io``.
    """
    if type(io) is not TorchCheckpointIO or not is_local(path):
        io.save_checkpoint(content, path, storage_options=storage_options)
        return
    provisional = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        io.save_checkpoint(content, provisional, storage_options=storage_options)
        os.replace(provisional, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(provisional)


def stage(content: dict[str, Any], checkpoint: Any, replica: int, token: str) -> None:
    """Write a replica's file under its provisional name."""
    TorchCheckpointIO().save_checkpoint(content, _provisional(checkpoint, replica, token))


def commit(checkpoint: Any, replica: int, token: str) -> None:
    """Give a replica's file its own name, and remove what earlier saves left half done."""
    if is_local(checkpoint):
        os.replace(_provisional(checkpoint, replica, token), _final(checkpoint, replica))
    else:
        get_filesystem(folder(checkpoint)).mv(_provisional(checkpoint, replica, token), _final(checkpoint, replica))
    tidy(checkpoint, replica, keep=())


def tidy(checkpoint: Any, replica: int, keep: Collection[str]) -> None:
    """Remove a replica's provisional files, but those with the tokens to keep."""
    fs = get_filesystem(folder(checkpoint))
    for path in _listed(checkpoint):
        name, _, token = os.path.basename(path).partition(".")
        if name == str(replica) and token.endswith(".part") and token.removesuffix(".part") not in keep:
            fs.rm(path)


def find(checkpoint: Any, replica: int, token: str) -> str | None:
    """Give the path of a replica's file, under either name; None where there is none."""
    fs = get_filesystem(folder(checkpoint))
    for path in (_provisional(checkpoint, replica, token), _final(checkpoint, replica)):
        if fs.exists(path):
            return path
    return None


def surplus(checkpoint: Any, replicas: int) -> list[str]:
    """Give the files of replicas that the checkpoint does not have."""
    known = {str(r) for r in range(replicas)}
    return [path for path in _listed(checkpoint) if os.path.basename(path).split(".")[0] not in known]


def read(path: str, token: str, weights_only: bool | None) -> dict[str, Any]:
    """Read a replica's file.

    Raises:
        ReplicaFileError: it cannot be read, or is of another save than the checkpoint; the message names it.
    """
    remedy = "copy the whole folder of the checkpoint again, or delete it to go on from the consensus"
    try:
        content = TorchCheckpointIO().load_checkpoint(path, weights_only=weights_only)
        found = content["token"]
    except Exception as error:
        raise ReplicaFileError(f"{path} cannot be read ({type(error).__name__}: {error}): {remedy}") from error
    if found != token:
        raise ReplicaFileError(f"{path} must be of the same save as its checkpoint, got another's: {remedy}")
    return content


def remove(checkpoint: Any) -> None:
    """Remove the folder of a checkpoint's replica files, if there is one."""
    fs = get_filesystem(folder(checkpoint))
    if fs.exists(folder(checkpoint)):
        fs.rm(folder(checkpoint), recursive=True)


def own_rng() -> dict[str, Any]:
    """Give the state of torch's generators, of which dropout and shuffling draw."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng(states: dict[str, Any]) -> None:
    """Go on from :func:`own_rng`."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


def _provisional(checkpoint: Any, replica: int, token: str) -> str:
    return os.path.join(folder(checkpoint), f"{replica}.{token}.part")


def _final(checkpoint: Any, replica: int) -> str:
    return os.path.join(folder(checkpoint), f"{replica}.pt")


def _listed(checkpoint: Any) -> list[str]:
    fs = get_filesystem(folder(checkpoint))
    return [str(p) for p in fs.ls(folder(checkpoint), detail=False)] if fs.exists(folder(checkpoint)) else []
