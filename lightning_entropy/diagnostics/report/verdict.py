"""What a comparison says in words, and where it says that there is nothing to say."""

from collections.abc import Sequence

from lightning_entropy.diagnostics.report.findings import Findings
from lightning_entropy.diagnostics.report.rows import Row, difference, smaller

NONE = "no difference beyond the error"


def pairs(first: Findings, second: Findings) -> list[tuple[str, Row, Row]]:
    """Return the numbers that both have, with their section, in the order of the page."""
    theirs = second.rows()
    return [
        (section, a, b)
        for section, rows in first.rows().items()
        for a in rows
        for b in theirs.get(section, [])
        if a.name == b.name
    ]


def compared(first: Row, second: Row, titles: Sequence[str]) -> str:
    """Return the difference of two numbers, second less first, with its error and what it means."""
    gap = difference(first, second)
    if first.better is None or second.better is None:
        return str(gap)
    best = smaller(first, second)
    return f"{gap}: {NONE}" if best is None else f"{gap}: {titles[best]} is {_adjective(first)}"


def _adjective(row: Row) -> str:
    return {"flatter": "flatter", "lower loss": "lower", "fewer errors": "lower"}[str(row.better)]


def verdict(first: Findings, second: Findings) -> list[str]:
    """Return sentences on the losses of two minima and on which is flatter, by how many of the numbers."""
    names = first.title, second.title
    sentences, votes, unequal = [], [], False
    for _, a, b in pairs(first, second):
        if a.better == "flatter":
            votes.append(smaller(a, b))
        elif a.better is not None:
            best, gap = smaller(a, b), difference(a, b)
            unequal = unequal or (best is not None and a.name == "training loss")
            name = a.name[0].upper() + a.name[1:]
            if best is None:
                sentences.append(f"{name}: {NONE} ({gap}).")
            else:
                sentences.append(f"{name}: {a} and {b}; {names[best]} is lower, by {_size(gap)}.")
    won = votes.count(0), votes.count(1)
    if votes and won[0] == won[1]:
        sentences.append(
            f"Neither is flatter: {won[0]} of {len(votes)} numbers for each, and {NONE} in {votes.count(None)}."
        )
    elif votes:
        best = int(won[1] > won[0])
        sentences.append(
            f"{names[best]} is flatter by {won[best]} of {len(votes)} numbers, {names[1 - best]} by {won[1 - best]}; "
            f"{NONE} in {votes.count(None)}."
        )
        if unequal:
            sentences.append(
                "Their training losses differ, and curvature falls with the loss: that may be all that is flatter."
            )
    return sentences


def _size(gap: object) -> str:
    return str(gap).removeprefix("-")
