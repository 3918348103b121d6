"""The page is good on a phone, in the dark, on paper and for a screen reader: what makes it so, and in a browser."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.figure import Figure

from lightning_entropy.diagnostics import gradient_noise, hessian_spectrum, local_entropy, overview
from lightning_entropy.diagnostics.report import page as page_module
from lightning_entropy.diagnostics.report.findings import SECTIONS, Findings, Left
from lightning_entropy.diagnostics.report.losses import loss_and_error
from lightning_entropy.diagnostics.report.page import page
from lightning_entropy.diagnostics.report.pictures import figures
from tests.diagnostics import tiny

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
QUICK = {"samples": 2, "warmup": 1, "leaps": 1, "chains": 3, "draws": 3, "groups": 2, "gamma": 10.0}
VOID = {"meta", "br", "img", "path", "use", "rect"}


def findings(title, scale):
    net, batches = tiny.net(), tiny.data()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(scale)
    return Findings(
        title,
        {
            "loss": loss_and_error(net, {"train": batches, "val": batches[:2]}),
            "hessian": hessian_spectrum(net, batches, groups=4, dense_limit=0, probes=4, steps=10),
            "local_entropy": local_entropy(
                net,
                batches[:1],
                sigmas=[0.01, 0.1],
                samples=2,
                warmup=1,
                leaps=1,
                chains=3,
                draws=3,
                groups=2,
                gamma=10.0,
            ),
            "gradient_noise": gradient_noise(net, batches, groups=4),
        },
        left={"hessian": Left(30, 90)},
    )


@pytest.fixture(scope="module")
def pair():
    return [findings("<first>.ckpt", 1.0), findings("second-of-a-rather-long-name-without-spaces.ckpt", 3.0)]


@pytest.fixture(scope="module")
def text(pair):
    return page(
        pair, source={"Settings": ", ".join(f"local_entropy.setting_{i}=[0.001,0.002,0.005]" for i in range(9))}
    )


class Outline(HTMLParser):
    """Elements with their attributes; fails where one is not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_it_has_an_outline_and_every_picture_its_words(text):
    found = Outline(text)
    assert found.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")
    assert len(found.all("h1")) == len(found.all("main")) == 1
    assert len(found.all("h2")) == 5
    headings = [name for name, _ in found.elements if re.fullmatch("h[1-6]", name)]
    assert headings == ["h1", *["h2"] * 5]
    for svg in found.all("svg"):
        assert svg["role"] == "img" and len(svg["aria-label"]) > 40
    assert "largest eigenvalue" in "".join(svg["aria-label"] for svg in found.all("svg"))
    assert found.all("img") == []
    assert len(found.all("caption")) == len(found.all("table")) == 4
    assert {a.get("scope") for a in found.all("th")} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:xlink:href="#|url\(#|aria-labelledby=")([\w-]+)', text)
    assert used and set(used) <= set(ids)
    assert "&lt;first&gt;.ckpt" in text and "<first>" not in text


def test_nothing_has_a_fixed_width_or_comes_from_elsewhere(text):
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    for rule in ("prefers-color-scheme: dark", "@media print", "@media screen and (max-width"):
        assert rule in style
    assert not re.search(r"(?<![-\w])(?:min-)?width: *[2-9]\d*px", style)
    for svg in Outline(text).all("svg"):
        assert "width" not in svg and "height" not in svg and "viewbox" in svg
    assert not re.search(r'(src|href)="(?!#|data:)', text)


def test_colours_can_be_told_from_their_ground(text):
    """Contrast of at least 4.5 to 1 (WCAG 2.1, AA) in light and dark."""
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    light, dark = style.split("prefers-color-scheme: dark")
    for part in (light, dark):
        colours = dict(re.findall(r"--(\w+): *(#[0-9a-f]{3,6})", part))
        assert {"text", "quiet", "ground", "good"} <= set(colours)
        for name in ("text", "quiet", "good"):
            assert contrast(colours[name], colours["ground"]) >= 4.5, (name, colours)


def contrast(a, b):
    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(c + c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        return sum(w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
                   for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))  # fmt: skip

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("section", ["loss", "hessian", "local_entropy", "gradient_noise"])
def test_pictures_of_two_share_axes_and_a_legend(pair, section):
    results = [found.results[section] for found in pair]
    drawn = figures(results)
    assert [i for i, _ in drawn] == [0, 1]
    first, second = (figure.axes[0] for _, figure in drawn)
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    for result in results:
        alone = figures([result])[0][1].axes[0]
        if section != "hessian":  # whose densities are smoothed anew, alike
            assert first.get_xlim()[0] <= alone.get_xlim()[0] and first.get_xlim()[1] >= alone.get_xlim()[1]
    assert first.get_legend() is not None and second.get_legend() is None
    shown = {part.get_text() for part in first.get_legend().get_texts()}
    assert set(second.get_legend_handles_labels()[1]) <= shown


def test_two_densities_are_smoothed_alike(pair):
    one, two = (found.results["hessian"].sigma for found in pair)
    assert one != two
    labels = {label for _, figure in figures([f.results["hessian"] for f in pair])
              for label in figure.axes[0].get_legend_handles_labels()[1] if "smoothed" in label}  # fmt: skip
    assert labels == {f"density, smoothed by {max(one, two):.1g}"}


def test_one_figure_for_a_logger_has_a_row_for_each(pair):
    figure = overview({found.title: list(found.results.values()) for found in pair})
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 8
    with pytest.raises(ValueError, match="results must hold something to draw"):
        overview({"a": []})


def test_every_section_has_a_heading_of_its_own():
    assert len(set(SECTIONS.values())) == len(SECTIONS)


# Says of the page within it, in a frame as wide as a phone, how wide it is and what its colours are. A window cannot be
# as narrow.
FRAME = """<!doctype html><html><head><meta name="color-scheme" content="light dark"></head><body>
<iframe id="frame" width="{width}" height="900" style="border: 0" srcdoc="{page}"></iframe><script>
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement
  const outside = [...page.querySelectorAll("h1, h2, p, li, td, th, svg, figure, dd")].filter(
    (e) => e.getBoundingClientRect().right > root.clientWidth)
  const colour = frame.contentWindow.getComputedStyle(root).backgroundColor
  document.body.textContent = `measured ${{root.scrollWidth}} ${{root.clientWidth}} ${{outside.length}} ${{colour}}`
}}
</script></body></html>"""


@pytest.mark.processes
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_is_wider_than_the_screen_and_the_dark_is_dark(text, tmp_path, dark, width):
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(text)), encoding="utf-8")
    scheme = [f"--blink-settings=preferredColorScheme={int(not dark)}"]
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *scheme, "--window-size=1400,1000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    body = re.search(r"measured (\d+) (\d+) (\d+) rgb\((\d+), (\d+), (\d+)\)", out)
    assert body, out[-500:]
    scroll, client, outside, *ground = map(int, body.groups())
    assert scroll <= client <= width
    assert client > width - 20
    assert outside == 0
    assert (max(ground) < 64) == dark


def test_a_page_that_grows_draws_what_is_new_and_is_as_if_all_were_drawn(pair, monkeypatch):
    whole, drawn, draw = pair[0].results, [], page_module._section
    found, sections = Findings("a"), page_module.Sections()
    page([found], sections=sections)
    monkeypatch.setattr(page_module, "_section", lambda name, given: drawn.append(name) or draw(name, given))
    for name in whole:
        found.results[name] = whole[name]
        drawn.clear()
        text = page([found], sections=sections)
        assert drawn == [name]
    found.left["hessian"] = Left(8)
    found.results["loss"] = loss_and_error(tiny.net(), {"train": tiny.data()})
    drawn.clear()
    again = page([found], sections=sections)
    assert set(drawn) == {"hessian", "loss"} and again != text
    assert again == page([found])
