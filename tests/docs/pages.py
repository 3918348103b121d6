"""The code of the documentation's pages: what it is, what it prints, and what the page says that it prints.

    python -m tests.docs.pages docs/start.md     run a page and write what it prints into it

A page's ``python`` blocks run in order in one namespace and an empty folder. What a block prints is the ``text`` block
right behind it. Before a block may stand ``<!-- file: NAME -->``, and it is a file that later blocks and pages import,
or ``<!-- not run: WHY -->``.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(
    r"^(?:<!-- (?P<kind>file|not run): (?P<what>.+?) -->\n+)?"
    r"```python\n(?P<code>.*?)^```\n"
    r"(?:\n*```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        code: Python.
        output: what the page says that it prints.
        line: of the page, where it begins.
        kind: ``file``, ``not run`` or None.
        what: the file's name, or why it is not run.
    """

    code: str
    output: str
    line: int
    kind: str | None
    what: str | None


def blocks(text: str) -> list[Block]:
    """Return a page's blocks in order."""
    return [
        Block(m["code"], m["output"] or "", text[: m.start("code")].count("\n") + 1, m["kind"], m["what"])
        for m in _BLOCK.finditer(text)
    ]


def files() -> dict[str, str]:
    """Return the files that pages define, by name."""
    return {b.what: b.code for page in PAGES for b in blocks(page.read_text()) if b.kind == "file" and b.what}


def run(page: Path, folder: Path) -> list[tuple[Block, str]]:
    """Run a page in a folder, and return what each block printed."""
    for name, code in files().items():
        (folder / name).write_text(code)
    before, modules = Path.cwd(), set(sys.modules)
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = []
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        for block in blocks(page.read_text()):
            if block.kind is not None:
                continue
            out = io.StringIO()
            # As many empty lines before it as there are in the page, so that a traceback names the page's line.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with contextlib.redirect_stdout(out):
                exec(code, namespace)
            printed.append((block, "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())))
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
        for name in {Path(file).stem for file in files()} & (set(sys.modules) - modules):
            del sys.modules[name]
    return printed


def differs(said: str, printed: str) -> bool:
    """Whether two outputs differ in their words, or in a number by more than a quarter of it and two of its last digit.

    Other processors and versions train a little differently; words have to be the same.
    """
    number = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
    if number.sub("#", said).split() != number.sub("#", printed).split():
        return True
    for a, b in zip(number.findall(said), number.findall(printed), strict=True):
        last_digit = 0.0 if "e" in a else 10.0 ** -len(a.partition(".")[2])
        if abs(float(a) - float(b)) > 0.25 * abs(float(a)) + 2 * last_digit:
            return True
    return False


def write(page: Path) -> None:
    """Put what a page prints into it."""
    with tempfile.TemporaryDirectory() as folder:
        printed = run(page, Path(folder))
    text = page.read_text()
    for block, output in printed:
        old = f"```python\n{block.code}```\n"
        said = f"\n```text\n{block.output}```\n"
        found = old + said if old + said in text else old
        text = text.replace(found, old + (f"\n```text\n{output}```\n" if output else ""))
    page.write_text(text)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        write(Path(argument).resolve())
