"""Write the table of what each method is good for, from the method cards, into the pages that show it.

python docs/cards.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "docs/methods"
PAGES = (ROOT / "README.md", ROOT / "docs/choose.md")
BEGIN, END = "<!-- from the method cards, by docs/cards.py -->\n", "<!-- end -->\n"
UNKNOWN = "not measured"
ROWS = ("helps", "does nothing, or harm", "costs")


def short(card: str) -> list[str]:
    """Return the short answers of a card, in the order of ``ROWS``."""
    answers = []
    for row in ROWS:
        found = re.search(rf"^\| {row} \| ([^|]+) \|", card, re.MULTILINE)
        if found is None:
            raise ValueError(f"a card must have a row '| {row} | in short | measured |'")
        answers.append(found[1].strip())
    return answers


def table(page: Path) -> str:
    """Return the table of all cards, with links relative to a page in a folder above theirs."""
    rows, rest = [], []
    for path in sorted(CARDS.glob("*.md")):
        if path.stem == "index":
            continue
        link = f"[`{path.stem}`]({path.relative_to(page.parent).as_posix()})"
        answers = short(path.read_text())
        if answers[0] == UNKNOWN:
            rest.append(link)
        else:
            rows.append([link, *answers])
    head = ["method", *ROWS]
    lines = ["| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *rows)]
    return "".join(lines) + (f"\nNot measured yet: {', '.join(rest)}.\n" if rest else "")


def filled(page: Path) -> str:
    """Return a page with the table between its two marks."""
    before, mark, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{page.name} must have the marks {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + "\n" + table(page) + "\n" + END + after


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page))
