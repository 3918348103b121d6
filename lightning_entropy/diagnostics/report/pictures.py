"""The pictures of a page, as SVG: those of two checkpoints share their axes, and have one legend."""

import html
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_entropy.diagnostics.figures import Result
from lightning_entropy.diagnostics.hessian import HessianResult
from lightning_entropy.diagnostics.hessian.density import density_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Inches: as many points as a phone is wide, so that letters are not scaled down.
_SIZE = (5.4, 3.9)


def figures(results: Sequence[Result]) -> "list[tuple[int, Figure]]":
    """Draw one or two results of the same kind, panel by panel; two share limits, and the first has both's legend.

    Two densities are smoothed alike, by the wider of their Gaussians: by different ones they could not be compared.

    Args:
        results: One or two.

    Returns:
        The pictures in order, each with the index of its result.
    """
    panels = [getattr(result, "panels", (result.plot,)) for result in _alike(results)]
    drawn = []
    for together in zip(*panels, strict=True):
        axes = [_draw(panel) for panel in together]
        if len(axes) == 2:
            _share(*axes)
        drawn += [(i, ax.figure) for i, ax in enumerate(axes)]
    return drawn  # type: ignore[return-value]


def _draw(panel: Callable[..., Any]) -> "Axes":
    from matplotlib.figure import Figure

    ax = Figure(figsize=_SIZE, layout="constrained").subplots()
    panel(ax)
    lines = [part for line in ax.get_title().split("\n") for part in textwrap.wrap(line, 62)]
    ax.set_title("\n".join(lines), fontsize=9)
    return ax


def _alike(results: Sequence[Result]) -> Sequence[Result]:
    spectra = [r for r in results if isinstance(r, HessianResult) and len(r.grid)]
    if len(spectra) < 2 or len(spectra) != len(results):
        return results
    sigma = max(r.sigma for r in spectra)
    return [_smoothed(r, sigma) for r in spectra]


def _smoothed(result: HessianResult, sigma: float) -> HessianResult:
    nodes, masses = list(result.nodes), list(result.masses)
    grid, density, errors, _ = density_of(nodes, masses, sigma, exact=result.exact, resampled=result.resampled)
    return replace(result, grid=grid, density=density, density_errors=errors, sigma=sigma)


def _share(first: "Axes", second: "Axes") -> None:
    for way in ("x", "y"):
        scales = [getattr(ax, f"get_{way}scale")() for ax in (first, second)]
        if scales[0] != scales[1]:
            continue
        limits = [getattr(ax, f"get_{way}lim")() for ax in (first, second)]
        ticks = [getattr(ax, f"get_{way}ticks")() for ax in (first, second)]
        fixed = _fixed(first, way) and _fixed(second, way)
        for ax in (first, second):
            if fixed:
                getattr(ax, f"set_{way}ticks")(sorted({float(t) for part in ticks for t in part}))
            getattr(ax, f"set_{way}lim")(min(low for low, _ in limits), max(high for _, high in limits))
    legend = second.get_legend()
    if legend is None:
        return
    handles, labels = first.get_legend_handles_labels()
    for handle, label in zip(*second.get_legend_handles_labels(), strict=True):
        if label not in labels:
            handles, labels = [*handles, handle], [*labels, label]
    shown = first.get_legend()
    if shown is None:  # the first has nothing that needs one: the second keeps its own
        return
    if len(labels) > len(shown.get_texts()):
        first.legend(handles, labels, fontsize=8)
    legend.remove()


def _fixed(ax: "Axes", way: str) -> bool:
    return type(getattr(ax, f"{way}axis").get_major_locator()).__name__ == "FixedLocator"


def svg(figure: "Figure", label: str, name: str) -> str:
    """Write a figure as an SVG element that a screen reader names.

    Args:
        figure: Drawn on nothing, so that the page's ground shows through.
        label: What is to be seen, in words.
        name: Unique on the page: a prefix of its ids.

    Returns:
        The element.
    """
    buffer = io.StringIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    # The element's own size in points would be a fixed width.
    text = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", text)
    text = re.sub(r'^<svg ([^>]*?)\bwidth="[^"]*"', r"<svg \1", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _style() -> Any:
    import matplotlib as mpl

    return mpl.rc_context({"svg.hashsalt": "lightning_entropy"})
