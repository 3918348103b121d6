"""The Markdown files: every relative link points to a file, and every anchor to a heading."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(p for p in ROOT.rglob("*.md") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))


def without_blocks(text: str) -> str:
    """Blank out fenced blocks, in which nothing is a link or a heading."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document; a repeated one gets -1, -2, ..."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", without_blocks(text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = 0
        while (name := f"{slug}-{count}" if count else slug) in found:
            count += 1
        found.add(name)
    return found


def broken_links(document: Path) -> list[str]:
    """Return the links of a document that lead nowhere. Links to other sites are not followed."""
    text = document.read_text()
    broken = []
    prose = re.sub(r"`[^`\n]*`", "", without_blocks(text))
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", prose):
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One, two: `three`\n\n## Same\n\n## Same\n\n```sh\n# no heading\n```\n")
    document = tmp_path / "page.md"
    document.write_text(
        "[a](other.md#one-two-three) [b](other.md#same-1) [c](https://example.org/x) `[d](code.md)` [e](#here)\n\n"
        "# Here\n\n[f](missing.md) ![g](no.png) [h](other.md#same-2) [i](#there) [j](other.md#no-heading)\n"
    )
    assert broken_links(document) == ["missing.md", "no.png", "other.md#same-2", "#there", "other.md#no-heading"]
