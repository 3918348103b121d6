"""Limits on what a command line may ask for, so that a slip of the finger is an error and not an hour or all memory.

``argument`` checks a number where it is read, ``check`` where an object is made, ``shorten`` keeps it out of the
message. The limits are far above every sensible value; nan is outside of all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)

LENGTH = 40  # characters of a number, and of a value in a message


def check(name: str, value: object, least: float, most: float) -> None:
    """Raise unless a value is a number in [least, most].

    Raises:
        ValueError: if it is not, as nan never is.

    Example:
        >>> check("width", 0, 1, 100)
        Traceback (most recent call last):
        ...
        ValueError: width must be in [1, 100], got 0
    """
    if not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name} must be in {interval(least, most)}, got {shorten(value)}")


def argument(kind: type[Number], least: float, most: float) -> Callable[[str], Number]:
    """Return an argparse ``type`` that reads an ``int`` or a ``float`` in [least, most].

    Example:
        >>> argument(int, 1, 100)("7")
        7
        >>> argument(float, 0, 1)("1e400")
        Traceback (most recent call last):
        ...
        argparse.ArgumentTypeError: must be a number in [0, 1], got 1e400
    """

    def read(text: str) -> Number:
        try:
            value = kind(text) if len(text) <= LENGTH else None
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} in {interval(least, most)}, got {shorten(text)}")
        return value

    return read


def interval(least: float, most: float) -> str:
    """Return ``[least, most]`` as text."""
    return f"[{least:.10g}, {most:.10g}]"


def shorten(value: object) -> str:
    """Return a value as text of at most ``LENGTH`` characters.

    Example:
        >>> shorten("9" * 1000)
        '9999999999999999999999999999999999999...'
    """
    text = str(value)
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 3]}..."
