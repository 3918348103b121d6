"""All diagnostics of a checkpoint as one self-contained HTML page, and two checkpoints side by side."""

import html
import io

from lightning_entropy.diagnostics.figures import Result, draw
from lightning_entropy.diagnostics.report.findings import SECTIONS, Findings
from lightning_entropy.diagnostics.report.rows import Row

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff }
body { max-width: 72rem; margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.6rem; margin: 0 0 .25rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem }
p { max-width: 46rem } .quiet { color: #5b6575 }
table { border-collapse: collapse; width: 100%; table-layout: fixed; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600 } td, th { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e3e7ee }
th { overflow-wrap: anywhere } th:first-child { width: 17rem } th.number { width: 13rem }
td.flat { font-weight: 600; color: #0a6b3d }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem }
figure { margin: 0; flex: 1 1 24rem; max-width: 48rem } figure.wide { flex-basis: 100%; max-width: none }
figcaption { color: #5b6575; font-size: .9rem }
svg { width: 100%; height: auto; display: block }
@media (prefers-color-scheme: dark) {
  :root { color: #e3e7ee; background: #14181f } .quiet, figcaption { color: #9aa5b5 } td.flat { color: #5fd39a }
  td, th { border-color: #2b3340 } svg { background: #fff; border-radius: .4rem }
}
@media (max-width: 55rem) { table { display: block; overflow-x: auto; table-layout: auto } }
"""


def page(findings: list[Findings], *, source: str = "") -> str:
    """Write one or two findings as an HTML page that needs nothing beside itself.

    With two, smaller of a pair that differs by more than both error bars is marked as the flatter, and counted.

    Args:
        findings: One, or two to compare.
        source: Where the numbers come from, in a sentence.

    Returns:
        The page.

    Raises:
        ValueError: If there are none or more than two.
    """
    if len(findings) not in (1, 2):
        raise ValueError(f"findings must be one or two, got {len(findings)}")
    titles = [html.escape(f.title) for f in findings]
    heading = titles[0] if len(findings) == 1 else f"{titles[0]} beside {titles[1]}"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Diagnostics of {heading}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Diagnostics of {heading}</h1>",
        '<p class="quiet">Error bars are 99 % intervals. Curvature, local entropy and noise depend on how weights are ',
        "scaled between layers: compare like with like.</p>",
    ]
    if len(findings) == 2:
        parts.append(f"<p><strong>{verdict(*findings)}</strong></p>")
    tables = [f.rows() for f in findings]
    for section, title in SECTIONS.items():
        if section not in findings[0].left and not any(section in table for table in tables):
            continue
        parts.append(f"<h2>{title}</h2>")
        if section in findings[0].left:
            parts.append(f"<p><strong>{unfinished(findings[0].left[section]).capitalize()}.</strong></p>")
        if any(section in table for table in tables):
            parts.append(_table([t.get(section, []) for t in tables], titles))
        parts.append('<div class="pictures">')
        for finding, name in zip(findings, titles, strict=True):
            if section in finding.results:
                picture = _svg(finding.results[section], f"{title}: {finding.title}")
                caption = f"<figcaption>{name}</figcaption>" if len(findings) == 2 else ""
                wide = ' class="wide"' if len(getattr(finding.results[section], "panels", ())) > 1 else ""
                parts.append(f"<figure{wide}>{picture}{caption}</figure>")
        parts.append("</div>")
    if source:
        parts.append(f'<p class="quiet">{html.escape(source)}</p>')
    return "\n".join([*parts, "</body></html>", ""])


def unfinished(examples: int) -> str:
    """Return a sentence on a section whose finest look was left out."""
    if not examples:
        return "not measured, since the look was ended"
    return f"a first look, on {examples:,} examples: a larger --budget has time for more"


def _flatter(a: Row, b: Row) -> int | None:
    """Return which of a pair is flatter beyond both error bars: 0 or 1, or None."""
    if not a.flatter or not abs(a.value - b.value) > a.error + b.error:
        return None
    return int(b.value < a.value)


def verdict(first: Findings, second: Findings) -> str:
    """Return a sentence that says which of two minima is flatter, by how many of the numbers."""
    pairs = [
        (a, b)
        for section, rows in first.rows().items()
        for a in rows
        for b in second.rows().get(section, [])
        if a.name == b.name and a.flatter
    ]
    votes = [_flatter(a, b) for a, b in pairs]
    won = votes.count(0), votes.count(1)
    names = html.escape(first.title), html.escape(second.title)
    if won[0] == won[1]:
        return f"Neither is flatter: {won[0]} of {len(votes)} numbers for each."
    best = int(won[1] > won[0])
    return (
        f"{names[best]} is flatter by {won[best]} of {len(votes)} numbers, {names[1 - best]} by {won[1 - best]}; "
        f"{votes.count(None)} do not tell."
    )


def _table(columns: list[list[Row]], titles: list[str]) -> str:
    names = list(dict.fromkeys(row.name for column in columns for row in column))
    head = "".join(f'<th class="number">{t}</th>' for t in (titles if len(titles) == 2 else ["value"]))
    lines = [f"<table><thead><tr><th>number</th>{head}<th>what it tells</th></tr></thead><tbody>"]
    for name in names:
        rows = [next((row for row in column if row.name == name), None) for column in columns]
        best = _flatter(*rows) if len(rows) == 2 and all(rows) else None  # type: ignore[arg-type]
        cells = ""
        for i, row in enumerate(rows):
            mark = " flat" if best == i else ""
            note = " (flatter)" if best == i else ""
            cells += f'<td class="number{mark}">{row or "–"}{note}</td>'  # noqa: RUF001
        meanings = dict.fromkeys(html.escape(row.meaning) for row in rows if row)
        lines.append(f'<tr><td>{html.escape(name)}</td>{cells}<td class="quiet">{" | ".join(meanings)}</td></tr>')
    return "\n".join([*lines, "</tbody></table>"])


def _svg(result: Result, label: str) -> str:
    buffer = io.StringIO()
    draw(result).savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
