"""All diagnostics of a checkpoint as one self-contained HTML page, and two checkpoints side by side."""

import html
from collections.abc import Mapping
from typing import Any

from lightning_entropy.diagnostics.report.findings import SECTIONS, Findings, Left
from lightning_entropy.diagnostics.report.pictures import figures, svg
from lightning_entropy.diagnostics.report.rows import Row, smaller
from lightning_entropy.diagnostics.report.style import STYLE
from lightning_entropy.diagnostics.report.verdict import compared, verdict

_READING = (
    "Error bars (±) are 99 % intervals. Curvature, local entropy and noise depend on how weights are scaled between "
    "layers: compare nets of one architecture. "
)
_COMPARING = (
    "A difference is a verdict only beyond its own 99 % interval, which is more than two and a half standard errors. "
    "Both checkpoints are measured on the same examples, and differences are taken group by group of examples."
)


class Sections:
    """The sections of a page that is written again and again as findings grow: each is drawn when it has changed."""

    def __init__(self) -> None:
        self._written: dict[str, tuple[list[Any], list[str]]] = {}

    def of(self, section: str, findings: list[Findings]) -> list[str]:
        """Return the lines of a section."""
        now: list[Any] = []
        for f in findings:
            now += [f.results.get(section), f.title, f.left.get(section), f.failed.get(section)]
        before, lines = self._written.get(section, ([], []))
        if len(before) != len(now) or any(
            a is not b if i % 4 == 0 else a != b for i, (a, b) in enumerate(zip(before, now, strict=True))
        ):
            lines = _section(section, findings)
            self._written[section] = now, lines
        return lines


def page(findings: list[Findings], *, source: Mapping[str, str] | None = None, sections: Sections | None = None) -> str:
    """Write one or two findings as an HTML page that needs nothing beside itself.

    Args:
        findings: One, or two to compare.
        source: Where the numbers come from, by name.
        sections: Of this page as it was written before. None: all are drawn.

    Returns:
        The page.

    Raises:
        ValueError: If there are none or more than two.
    """
    if len(findings) not in (1, 2):
        raise ValueError(f"findings must be one or two, got {len(findings)}")
    sections = Sections() if sections is None else sections
    titles = [html.escape(f.title) for f in findings]
    heading = titles[0] if len(findings) == 1 else f"{titles[0]} beside {titles[1]}"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Diagnostics of {heading}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>Diagnostics of {heading}</h1>",
        f'<p class="quiet">{_READING}{_COMPARING if len(findings) == 2 else ""}</p>',
    ]
    if len(findings) == 2 and (sentences := verdict(*findings)):
        parts.append("<ul class='verdict'>")
        parts += [f"<li>{html.escape(sentence)}</li>" for sentence in sentences]
        parts.append("</ul>")
    for section in SECTIONS:
        parts += sections.of(section, findings)
    if source:
        parts.append('<section><h2 id="source">Where this comes from</h2><dl>')
        parts += [f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in source.items()]
        parts.append("</dl></section>")
    return "\n".join([*parts, "</main></body></html>", ""])


def _section(section: str, findings: list[Findings]) -> list[str]:
    rows = [f.rows().get(section, []) for f in findings]
    first = findings[0]
    if not (section in first.left or section in first.failed or any(rows)):
        return []
    title = SECTIONS[section]
    parts = [f'<section aria-labelledby="{section}"><h2 id="{section}">{title}</h2>']
    if section in first.failed:
        parts.append(f"<p><strong>{html.escape(failure(first.failed[section], any(rows)))}</strong></p>")
    elif section in first.left:
        words = unfinished(first.left[section])
        parts.append(f"<p><strong>{words[0].upper()}{words[1:]}.</strong></p>")
    if any(rows):
        parts.append(_table(title, rows, [f.title for f in findings]))
    shown = [f for f in findings if section in f.results]
    if shown:
        parts.append('<div class="pictures">')
        for i, (which, figure) in enumerate(figures([f.results[section] for f in shown])):
            finding = shown[which]
            numbers = "; ".join(f"{row.name} {row}" for row in finding.rows()[section][:4])
            picture = svg(figure, f"Picture of {title}, {finding.title}: {numbers}", f"{section}{i}")
            caption = f"<figcaption>{html.escape(finding.title)}</figcaption>" if len(findings) == 2 else ""
            parts.append(f"<figure>{picture}{caption}</figure>")
        parts.append("</div>")
    return [*parts, "</section>"]


def failure(reason: str, before: bool) -> str:
    """Return a sentence on a section that an estimator has refused, perhaps after a first look."""
    return f"{'Not measured on more examples' if before else 'Not measured'}: {reason}"


def unfinished(left: Left) -> str:
    """Return a sentence on a section whose finest look was left out, with what would take it."""
    with_it = "" if left.budget is None else f"; --budget {left.budget} has time for all of it"
    if not left.examples:
        why = "since the look was ended" if left.budget is None else "for want of time"
        return f"not measured, {why}{with_it}"
    return f"a first look, on {left.examples:,} examples{with_it}"


def _table(title: str, columns: list[list[Row]], titles: list[str]) -> str:
    names = list(dict.fromkeys(row.name for column in columns for row in column))
    heads = [*titles, "difference, second less first"] if len(titles) == 2 else ["value"]
    head = "".join(f'<th scope="col">{html.escape(t)}</th>' for t in heads)
    lines = [
        f"<table><caption>{title}: numbers</caption>",
        f'<thead><tr><th scope="col">number</th>{head}<th scope="col">how to read it</th></tr></thead><tbody>',
    ]
    for name in names:
        rows = [next((row for row in column if row.name == name), None) for column in columns]
        both = len(rows) == 2 and rows[0] is not None and rows[1] is not None
        best = smaller(*rows) if both else None  # type: ignore[arg-type]
        cells = ""
        for i, (row, label) in enumerate(zip(rows, titles, strict=True)):
            mark = " best" if best == i else ""
            text = "not measured" if row is None else html.escape(str(row))
            cells += f'<td class="number{mark}" data-label="{html.escape(label) if len(rows) == 2 else ""}">{text}</td>'
        if len(rows) == 2:
            words = compared(*rows, titles) if both else ""  # type: ignore[call-arg,arg-type]
            cells += f'<td data-label="{"difference" if words else ""}">{html.escape(words)}</td>'
        meanings = dict.fromkeys(html.escape(row.meaning) for row in rows if row)
        meaning = " | ".join(meanings)
        lines.append(
            f'<tr><th scope="row">{html.escape(name)}</th>{cells}<td class="meaning quiet">{meaning}</td></tr>'
        )
    return "\n".join([*lines, "</tbody></table>"])
