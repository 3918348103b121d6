"""The number that every saved state carries, so that another version knows what it reads."""

from collections.abc import Mapping
from typing import Any


def check_format(what: str, state: Mapping[str, Any], newest: int) -> int:
    """Return the format of a saved state: 1, version 0.1's, where it has none.

    Args:
        what: the state, for the message.
        state: as it was saved.
        newest: the newest format that is understood.

    Raises:
        ValueError: a newer one.

    Example:
        >>> check_format("state_dict", {"format": 2}, 2), check_format("state_dict", {}, 2)
        (2, 1)
    """
    found = state.get("format", 1)
    if not isinstance(found, int) or found > newest:
        raise ValueError(
            f"{what} must be of format {newest} or older, got format {found!r}: "
            "load it with the version of lightning_entropy that wrote it, or a newer one"
        )
    return found
