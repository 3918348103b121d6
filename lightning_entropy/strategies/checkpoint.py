"""What belongs to one replica, in a file of its own beside the checkpoint: ``<file>.replicas/<r>.pt``.

A save is complete or absent. The replicas write their files under provisional names that contain the save's token;
then the checkpoint with the same token replaces the old one; then the files get their final names. A crash before the
replacement leaves the old checkpoint and the old files; one after it leaves the new ones, some under provisional names.
"""

import os
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightning_entropy.strategies.options import Grid

KEY = "elastic_replicas"  # in the main checkpoint: replicas, token, and the loops' counters


class ReplicaFileError(RuntimeError):
    """A replica's file cannot be read, or belongs to another checkpoint."""


def folder(checkpoint: Any) -> str:
    """Return the folder of a checkpoint's replica files."""
    return f"{os.fspath(checkpoint)}.replicas"


def is_local(path: Any) -> bool:
    """Whether files there can be renamed atomically."""
    return "://" not in str(path)


def save_whole(io: CheckpointIO, content: dict[str, Any], path: Any, storage_options: Any = None) -> None:
    """Write a checkpoint atomically: at every moment the file is the old one or the new one, never a part.

    Args:
        io: writes it. One that is not Lightning's own (asynchronous, remote) is as atomic as it is.
        content: the checkpoint.
        path: of the file.
        storage_options: for ``io``.
    """
    if type(io) is not TorchCheckpointIO or not is_local(path):
        io.save_checkpoint(content, path, storage_options=storage_options)
        return
    provisional = f"{os.fspath(path)}.part"
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
    """Move a replica's file to its final name, and remove what interrupted saves have left."""
    if is_local(checkpoint):
        os.replace(_provisional(checkpoint, replica, token), _final(checkpoint, replica))
    else:
        get_filesystem(folder(checkpoint)).mv(_provisional(checkpoint, replica, token), _final(checkpoint, replica))
    tidy(checkpoint, replica, keep=())


def tidy(checkpoint: Any, replica: int, keep: Collection[str]) -> None:
    """Remove a replica's provisional files, except those with the tokens to keep."""
    fs = get_filesystem(folder(checkpoint))
    for path in _listed(checkpoint):
        name, _, token = os.path.basename(path).partition(".")
        if name == str(replica) and token.endswith(".part") and token.removesuffix(".part") not in keep:
            fs.rm(path)


def find(checkpoint: Any, replica: int, token: str) -> str | None:
    """Return the path of a replica's file, under either name; None if there is none."""
    fs = get_filesystem(folder(checkpoint))
    for path in (_provisional(checkpoint, replica, token), _final(checkpoint, replica)):
        if fs.exists(path):
            return path
    return None


def surplus(checkpoint: Any, replicas: int) -> list[str]:
    """Return the files of replicas that the checkpoint does not have."""
    known = {str(r) for r in range(replicas)}
    return [path for path in _listed(checkpoint) if os.path.basename(path).split(".")[0] not in known]


def read(path: str, token: str, weights_only: bool | None, replica: int | None = None) -> dict[str, Any]:
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
    other = content.get("replica", replica)  # which version 0.1 did not write
    if replica is not None and other != replica:
        raise ReplicaFileError(f"{path} must be of replica {replica}, got the file of replica {other}: {remedy}")
    return content


def remove(checkpoint: Any) -> None:
    """Remove the folder of a checkpoint's replica files, if there is one."""
    fs = get_filesystem(folder(checkpoint))
    if fs.exists(folder(checkpoint)):
        fs.rm(folder(checkpoint), recursive=True)


def _provisional(checkpoint: Any, replica: int, token: str) -> str:
    return os.path.join(folder(checkpoint), f"{replica}.{token}.part")


def _final(checkpoint: Any, replica: int) -> str:
    return os.path.join(folder(checkpoint), f"{replica}.pt")


def _listed(checkpoint: Any) -> list[str]:
    fs = get_filesystem(folder(checkpoint))
    return [str(p) for p in fs.ls(folder(checkpoint), detail=False)] if fs.exists(folder(checkpoint)) else []


def new_run(broadcast: Callable[[str], str]) -> str:
    """Return a name that no other run has, the first rank's on all ranks. A collective."""
    return str(broadcast(uuid.uuid4().hex[:12]))


class ReplicaFiles:
    """Saves a checkpoint in parts: one main file, and one for every replica.

    Args:
        grid: where this rank stands.
        run: a name that no other run has, the same on all ranks.
        barrier: waits for all ranks.
    """

    def __init__(self, grid: Grid, run: str, barrier: Callable[[], None]) -> None:
        self._grid, self._run, self._barrier = grid, run, barrier
        self._saves = 0
        self._last: dict[str, str] = {}  # token of the last save to a path

    def save(
        self,
        io: CheckpointIO,
        checkpoint: dict[str, Any],
        own: dict[str, Any],
        info: dict[str, Any],
        path: Any,
        storage_options: Any = None,
    ) -> None:
        """Write the replicas' files, then the main one.

        Args:
            io: writes the main file.
            checkpoint: the main file's content; only the first rank's is written.
            own: the content of this replica's file.
            info: added to the main file, for a load with another number of replicas.
            path: of the main file.
            storage_options: for ``io``.
        """
        self._saves += 1  # the same on all ranks, so the token needs no message
        token = f"{self._run}-{self._saves}"
        writes = self._grid.position == 0
        if writes:
            stage({"token": token, "replica": self._grid.replica, **own}, path, self._grid.replica, token)
        self._barrier()
        if self._grid.rank == 0:
            parts = {KEY: {"replicas": self._grid.replicas, "token": token, **info}}
            save_whole(io, {**checkpoint, **parts}, path, storage_options)
        self._barrier()
        if writes and type(io) is TorchCheckpointIO:
            commit(path, self._grid.replica, token)
        elif writes:  # the main file may be written later: both saves' files stay, and a load picks those of its token
            tidy(path, self._grid.replica, keep={token, self._last.get(str(path), "")})
        self._last[str(path)] = token


def load(checkpoint: dict[str, Any], path: Any, grid: Grid, weights_only: bool | None) -> dict[str, Any] | None:
    """Read this replica's file of a checkpoint that has some. A collective.

    Args:
        checkpoint: the main file's content. What :meth:`ReplicaFiles.save` added is removed.
        path: the main file.
        grid: where this rank stands.
        weights_only: as for ``torch.load``.

    Returns:
        The replica's own state, or ``{"counters": ...}`` if all start from the consensus, with a warning that says
        why; None if the checkpoint has no replicas.

    Raises:
        ReplicaFileError: a file cannot be read or is of another save; on all ranks.
    """
    info = checkpoint.pop(KEY, None)
    if info is None:
        return None
    counters = {"counters": info["counters"]}
    path = os.path.realpath(path) if is_local(path) else path  # "last.ckpt" may be a link
    start = "all of them start from the consensus, with the momentum of the first"
    if info["replicas"] != grid.replicas:
        rank_zero_warn(f"{path} has {info['replicas']} replicas, and there are {grid.replicas}: {start}")
        return counters
    file = find(path, grid.replica, info["token"])
    content, error, missing = None, None, None
    if file is None:
        missing = _final(path, grid.replica)
    else:
        try:
            content = read(file, info["token"], weights_only, grid.replica)
        except ReplicaFileError as caught:
            error = str(caught)
    answers: list[Any] = [None] * grid.world_size
    dist.all_gather_object(answers, (error, missing))
    errors = sorted({error for error, _ in answers if error is not None})
    if errors:
        raise ReplicaFileError("; ".join(errors))
    gone = sorted({missing for _, missing in answers if missing is not None})
    if gone:
        rank_zero_warn(f"{', '.join(gone)}, of one of {grid.replicas} replicas, is missing: {start}")
        return counters
    for extra in surplus(path, grid.replicas):
        rank_zero_warn(f"{extra} belongs to none of the {grid.replicas} replicas of {path} and is not read")
    return content
