"""What a replica says of itself to whoever has started it, through a small file."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

STATUS = "LIGHTNING_ENTROPY_STATUS"  # in the environment: the file's path; without it nothing is written


def report(step: int, metrics: dict[str, Any]) -> None:
    """Write where the training is, replacing what was written before.

    Args:
        step: training steps done.
        metrics: of an outer step.
    """
    path = os.environ.get(STATUS)
    if path is None:
        return
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    provisional = Path(f"{path}.part")
    with suppress(OSError):  # a full disk, say, is no reason to stop
        provisional.write_text(json.dumps({"step": step, **numbers}))
        provisional.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Return what :func:`report` has written last; empty before."""
    try:
        status: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return status
