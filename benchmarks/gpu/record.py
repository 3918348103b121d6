"""Pieces of work whose results are kept: what is there is not done again, and what does not fit is left for later."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Attributes:
        name: of it, once and for all.
        seconds: about how long it takes.
        work: does it, and returns what is to be kept.
    """

    name: str
    seconds: float
    work: Callable[[], list[Row]]


def finished(file: Path) -> dict[str, Row]:
    """Return what is kept, by the pieces' names; a last line that is cut off counts for nothing.

    Args:
        file: a line of JSON for each piece.
    """
    found = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[entry["piece"]] = entry
    return found


def run(pieces: Iterable[Piece], file: Path, budget: float) -> list[str]:
    """Do the pieces that are not there yet, while they fit into the budget.

    One that raises an error is kept with its error, and tried again the next time.

    Args:
        pieces: in their order.
        file: where results are kept.
        budget: seconds.

    Returns:
        The names of those that are left.
    """
    end, done, left = time.monotonic() + budget, finished(file), []
    torn = file.exists() and not file.read_bytes().endswith(b"\n")
    for piece in pieces:
        if "error" not in done.get(piece.name, {"error": ""}):
            continue
        if time.monotonic() + piece.seconds > end:
            left.append(piece.name)
            continue
        print(f"{piece.name} (about {piece.seconds:.0f} s)", file=sys.stderr, flush=True)
        start = time.monotonic()
        entry: Row = {"piece": piece.name}
        try:
            entry["rows"] = piece.work()
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(f"{piece.name}: {entry['error']}", file=sys.stderr, flush=True)
        entry["seconds"] = round(time.monotonic() - start, 1)
        with file.open("a") as out:
            out.write("\n" * torn + json.dumps(entry) + "\n")
        torn = False
    return left
