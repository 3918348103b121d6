"""The tables of what is kept, for the terminal and as a page."""

import html
from typing import Any

from benchmarks.gpu.record import Row

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #8884; text-align: left }
td:not(:first-child), th:not(:first-child) { text-align: right }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd } }"""


def shown(value: Any) -> str:
    """Return a value as it stands in a table."""
    if isinstance(value, list):
        return " to ".join(shown(v) for v in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def tables(entries: list[Row]) -> list[tuple[str, list[list[str]]]]:
    """Return a title and the lines of a table for every piece; the first line is the head.

    Args:
        entries: what is kept. Rows of the same columns under titles that differ after the last comma are one table.
    """
    found: list[tuple[str, list[list[str]]]] = []
    for entry in entries:
        if "error" in entry:
            found.append((entry["piece"], [["error"], [entry["error"]]]))
            continue
        for row in entry["rows"]:
            title = row.get("table", entry["piece"])
            head, line = [k for k in row if k != "table"], [shown(v) for k, v in row.items() if k != "table"]
            same = next((lines for name, lines in found if name == title and lines[0] == head), None)
            if same is None:
                found.append((title, [head, line]))
            else:
                same.append(line)
    return found


def markdown(heading: str, facts: dict[str, str], entries: list[Row]) -> str:
    """Return everything as Markdown."""
    parts = [f"# {heading}", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
    for title, (head, *lines) in tables(entries):
        rows = [head, ["---"] * len(head), *lines]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join(parts) + "\n"


def page(heading: str, facts: dict[str, str], entries: list[Row]) -> str:
    """Return everything as a page of HTML."""

    def cells(tag: str, row: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = [f"<h1>{html.escape(heading)}</h1>", "<ul>"]
    body += [f"<li>{html.escape(name)}: {html.escape(value)}</li>" for name, value in facts.items()]
    body.append("</ul>")
    for title, (head, *lines) in tables(entries):
        body.append(f"<h2>{html.escape(title)}</h2>\n<table>{cells('th', head)}")
        body += [cells("td", line) for line in lines]
        body.append("</table>")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(heading)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
