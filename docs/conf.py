"""The documentation site: ``python -m sphinx -W --keep-going -q -b html docs build/site``, with the extra ``docs``.

Pages are Markdown (MyST) that reads as well in a repository's viewer; the API comes from the docstrings. Nothing is
fetched, neither when it is built nor when it is read: furo has its fonts and scripts with it.
"""

import re
import sys
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning_entropy  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

project = "lightning_entropy"
author = copyright = "the lightning_entropy contributors"
version = release = lightning_entropy.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["build", "_build"]
html_theme = "furo"
html_title = f"lightning_entropy {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "none"  # the docstrings say type and range
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
nitpicky = False

# Files of the repository that are pages of the site, too, by the page that includes them.
INCLUDED = {
    "recipes/README.md": "recipes.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "README.md": "index.md",
}


def link_within_the_site(text: str, folder: Path) -> str:
    """Point links between files of the repository to pages of the site, and those to other files to the repository.

    Args:
        text: Markdown.
        folder: what its links are relative to.
    """

    def replace(found: re.Match[str]) -> str:
        target, _, anchor = found[2].partition("#")
        if not target or re.match(r"[a-z][a-z+.-]*:", target):
            return found[0]
        path = (folder / target).resolve()
        if not path.is_relative_to(ROOT):
            return found[0]
        name = path.relative_to(ROOT).as_posix()
        if name in INCLUDED:
            return f"{found[1]}(/{INCLUDED[name]}{'#' + anchor if anchor else ''})"
        if path.is_relative_to(ROOT / "docs"):
            return f"{found[1]}(/{path.relative_to(ROOT / 'docs').as_posix()}{'#' + anchor if anchor else ''})"
        return f"{found[1]}({REPOSITORY}/blob/main/{name})"

    return re.sub(r"(!?\[(?:[^\]\[]|\[[^\]]*\])*\])\(([^)\s]+)\)", replace, text)


def read_source(app: Any, name: str, source: list[str]) -> None:
    """Rewrite the links of a page."""
    source[0] = link_within_the_site(source[0], Path(app.srcdir, name).parent)


def read_include(app: Any, path: Path, name: str, source: list[str]) -> None:
    """Rewrite the links of an included file."""
    source[0] = link_within_the_site(source[0], (Path(app.srcdir) / path).resolve().parent)


def as_restructured_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape what the docstrings' plain-text mathematics has in common with reStructuredText's markup."""
    code = False
    for i, line in enumerate(lines):
        if line.rstrip().endswith("::"):
            code = True
        elif code and line and not line.startswith(" "):
            code = False
        if code or line.lstrip().startswith((">>>", "...")):
            continue
        parts = re.split(r"(``.*?``|:\w+:`[^`]*`|`[^`]*`)", line)
        lines[i] = "".join(p if k % 2 else re.sub(r"\|", r"\\|", p) for k, p in enumerate(parts))


def setup(app: Any) -> None:
    """Connect the above."""
    app.connect("source-read", read_source)
    app.connect("include-read", read_include)
    app.connect("autodoc-process-docstring", as_restructured_text)
