"""Cache on disk what took time to compute; a file appears whole or not at all."""

from __future__ import annotations

import glob
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

DAY = 86400.0  # seconds


def cached(path: Path, build: Callable[[], Any]) -> Any:
    """Load ``path``, or build its content, write it there and return it.

    The content is written beside ``path`` under a temporary name, flushed to the disk and renamed: a reader, a
    second process or a restart after a crash never sees half a file.

    Args:
        path: the file; its folder is made.
        build: returns tensors, numbers, strings, and lists, tuples and dicts of them. Called only if ``path`` is not
            there.

    Raises:
        OSError: if the file cannot be written (a full disk, say) or read; names it. No temporary file is left.
    """
    if path.exists():
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:
            raise OSError(f"cache must be readable, got {path}: delete it and it will be made again") from error
    content = build()
    try:
        write(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"cache must be writable, got {path} ({cause}); no part of it was kept") from error
    return content


def write(path: Path, save: Callable[[Any], None]) -> None:
    """Write a file so that it appears whole: ``save`` gets a binary file, which is then renamed to ``path``.

    Raises:
        BaseException: whatever ``save`` raises, after the temporary file is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _sweep(path: Path) -> None:
    """Remove the temporary files of ``path`` that processes killed more than a day ago have left."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > DAY:
                old.unlink()


def _umask() -> int:
    """Return the permissions that this process withholds from new files; to read the mask is to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
