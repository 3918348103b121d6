"""Files beside a checkpoint, ``<file>.replicas/<r>.pt``: written so that a crash leaves the old ones or the new ones.

A rank writes its file under a provisional name that contains the save's token, and moves it to its final name when the
checkpoint with the same token is in place. A token is ``<run>-<number of the save>-<step>``.
"""

import os
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem


class ReplicaFileError(RuntimeError):
    """A replica's file cannot be read, or belongs to another checkpoint."""


def folder(checkpoint: Any) -> str:
    """Return the folder of a checkpoint's replica files."""
    return f"{os.fspath(checkpoint)}.replicas"


def is_local(path: Any) -> bool:
    """Whether files there can be renamed atomically."""
    return "://" not in str(path)


def save_whole(
    io: CheckpointIO, content: dict[str, Any], path: Any, storage_options: Any = None, *, writer: str = ""
) -> None:
    """Write a checkpoint atomically: at every moment the file is the old one or the new one, never a part.

    Args:
        io: writes it. One that is not Lightning's own (asynchronous, remote) is as atomic as it is.
        content: the checkpoint.
        path: of the file.
        storage_options: for ``io``.
        writer: a name of whoever writes, where another process may write the same file meanwhile.
    """
    if type(io) is not TorchCheckpointIO or not is_local(path):
        io.save_checkpoint(content, path, storage_options=storage_options)
        return
    provisional = f"{os.fspath(path)}{writer and f'.{writer}'}.part"
    try:
        io.save_checkpoint(content, provisional, storage_options=storage_options)
        os.replace(provisional, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(provisional)


def stage(content: dict[str, Any], checkpoint: Any, name: str, token: str) -> None:
    """Write a rank's file under its provisional name."""
    TorchCheckpointIO().save_checkpoint(content, _provisional(checkpoint, name, token))


def commit(checkpoint: Any, name: str, token: str) -> None:
    """Move a rank's file to its final name, and remove what interrupted saves have left."""
    if is_local(checkpoint):
        os.replace(_provisional(checkpoint, name, token), final_path(checkpoint, name))
    else:
        get_filesystem(folder(checkpoint)).mv(_provisional(checkpoint, name, token), final_path(checkpoint, name))
    tidy(checkpoint, name, keep=())


def tidy(checkpoint: Any, name: str, keep: Collection[str]) -> None:
    """Remove a rank's provisional files, except those with the tokens to keep."""
    fs = get_filesystem(folder(checkpoint))
    for token, path in _staged(checkpoint, name).items():
        if token not in keep:
            fs.rm(path)


def surplus(checkpoint: Any, names: Collection[str]) -> list[str]:
    """Return the files of ranks that the checkpoint does not have."""
    return [path for path in _listed(checkpoint) if os.path.basename(path).split(".")[0] not in names]


def read(path: str, weights_only: bool | None, name: str | None = None) -> dict[str, Any]:
    """Read a rank's file.

    Raises:
        ReplicaFileError: it cannot be read, or is another rank's; the message names it.
    """
    remedy = "copy the whole folder of the checkpoint again, or delete it to go on from the consensus"
    try:
        content = TorchCheckpointIO().load_checkpoint(path, weights_only=weights_only)
        content["token"]
    except Exception as error:
        raise ReplicaFileError(f"{path} cannot be read ({type(error).__name__}: {error}): {remedy}") from error
    other = str(content.get("replica", name))  # which version 0.1 did not write
    if name is not None and other != name:
        raise ReplicaFileError(f"{path} must be of replica {name}, got the file of replica {other}: {remedy}")
    return content


def remove(checkpoint: Any) -> None:
    """Remove the folder of a checkpoint's replica files, if there is one."""
    fs = get_filesystem(folder(checkpoint))
    if fs.exists(folder(checkpoint)):
        fs.rm(folder(checkpoint), recursive=True)


def _provisional(checkpoint: Any, name: str, token: str) -> str:
    return os.path.join(folder(checkpoint), f"{name}.{token}.part")


def final_path(checkpoint: Any, name: str) -> str:
    """Return the path of a rank's file."""
    return os.path.join(folder(checkpoint), f"{name}.pt")


def _staged(checkpoint: Any, name: str) -> dict[str, str]:
    """Return a rank's files under provisional names, by token."""
    found = {}
    for path in _listed(checkpoint):
        own, _, token = os.path.basename(path).partition(".")
        if own == name and token.endswith(".part"):
            found[token.removesuffix(".part")] = path
    return found


def _listed(checkpoint: Any) -> list[str]:
    fs = get_filesystem(folder(checkpoint))
    return [str(p) for p in fs.ls(folder(checkpoint), detail=False)] if fs.exists(folder(checkpoint)) else []


def contents(path: Any, name: str, token: str, weights_only: bool | None) -> dict[str, dict[str, Any]]:
    """Return a rank's files of the run of a token, by their own tokens."""
    by_token: dict[str, dict[str, Any]] = {}
    staged, final = _staged(path, name), final_path(path, name)
    if token in staged:
        by_token[token] = read(staged[token], weights_only, name)
    if get_filesystem(folder(path)).exists(final):
        try:
            content = read(final, weights_only, name)
        except ReplicaFileError:
            if token not in by_token:
                raise
        else:
            if run_of(content["token"]) != run_of(token) and token not in by_token:
                raise ReplicaFileError(
                    f"{final} must be of the same save as its checkpoint, got another's: copy the whole folder of the "
                    "checkpoint again, or delete it to go on from the consensus"
                )
            by_token[content["token"]] = content
    return by_token


def run_of(token: str) -> str:
    """Return the run of a token."""
    return token.split("-")[0]
