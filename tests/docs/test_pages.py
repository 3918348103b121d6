"""The documentation says what the code does: its blocks run and print what they say, and nothing public is missing."""

import ast
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import lightning_entropy as le
from docs import cards
from lightning_entropy import diagnostics, pde
from lightning_entropy.methods import presets
from tests.docs.pages import PAGES, ROOT, blocks, differs, files, run

CODE = [page for page in PAGES if any(block.kind is None for block in blocks(page.read_text()))]
PRESETS = [name for name, f in inspect.getmembers(presets, inspect.isfunction) if f.__module__ == presets.__name__]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.filterwarnings("ignore")  # Lightning's, on tiny data
@pytest.mark.parametrize("page", CODE, ids=name)
def test_a_page_prints_what_it_says(page: Path, tmp_path: Path) -> None:
    for block, printed in run(page, tmp_path):
        assert not differs(block.output, printed), f"line {block.line} prints\n{printed}"


def test_a_number_may_differ_a_little_and_a_word_not() -> None:
    assert not differs("error 4.5 %, loss 0.15", "error 4.6 %, loss 0.16")
    assert differs("error 4.5 %", "error 6.0 %")
    assert differs("error 4.5 %", "loss 4.5 %")
    assert differs("", "something")


def test_files_of_pages_can_be_imported_and_others_are_not_run() -> None:
    assert set(files()) == {"digits.py", "elastic.py", "sharded_model.py", "train.py"}
    for code in files().values():
        ast.parse(code)
    for page in PAGES:
        written = [block.code for block in blocks(page.read_text())]
        assert len(written) == len(re.findall(r"^```python\n", page.read_text(), re.MULTILINE)), page


@pytest.mark.filterwarnings("ignore:Setuptools is replacing distutils")  # of old ones
def test_commands_of_the_pages_exist() -> None:
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for module in re.findall(r"python -m ([\w.]+)", block):
                assert find_spec(module) is not None, f"{name(page)}: python -m {module}"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_a_card(preset: str) -> None:
    path = ROOT / f"docs/methods/{preset}.md"
    assert path.exists(), f"{name(path)} is missing: every preset has a card"
    card = path.read_text()
    for part in (f"# `{preset}`", "```text\n", "```python\n", "| helps |", "| does nothing, or harm |", "| costs |"):
        assert part in card
    assert "**Known differences.**" in card and f".. autofunction:: {preset}\n" in card
    assert f"[`{preset}`]({preset}.md)" in (ROOT / "docs/methods/index.md").read_text()


@pytest.mark.parametrize("page", cards.PAGES, ids=name)
def test_the_table_of_methods_is_the_cards(page: Path) -> None:
    assert page.read_text() == cards.filled(page), "run python docs/cards.py"


def test_a_card_that_does_not_answer_is_said() -> None:
    with pytest.raises(ValueError, match=r"must have a row '\| costs"):
        cards.short("| helps | a | b |\n| does nothing, or harm | c | d |\n")


def test_every_cell_of_what_it_works_with_is_a_test() -> None:
    section = (ROOT / "README.md").read_text().partition("## What it works with\n")[2].partition("\n## ")[0]
    cells = [cell for line in section.splitlines() if line.startswith("| ") for cell in line.split(" | ")[1:]]
    links = re.findall(r"\[[^]]+\]\((\S+?)(?: \"(\w+)\")?\)", section)
    assert len(links) >= len(cells) - 4 > 20  # the two cells of the head and of the line below it
    for path, test in links:
        if path.startswith("tests/"):
            assert f"\ndef {test}(" in (ROOT / path).read_text(), f"{path} has no {test}"


def test_a_card_is_of_a_preset() -> None:
    assert {path.stem for path in (ROOT / "docs/methods").glob("*.md")} == {"index", *PRESETS}


@pytest.mark.parametrize("module", [le, diagnostics, pde], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_api(module: object) -> None:
    text = "\n".join(
        path.read_text() for path in [*(ROOT / "docs/api").glob("*.md"), *(ROOT / "docs/methods").glob("*.md")]
    )
    documented = set(re.findall(r"^\.\. auto(?:class|function):: (\w+)$", text, re.MULTILINE))
    assert set(module.__all__) - documented == set()  # type: ignore[attr-defined]


def test_every_message_of_the_questions_exists() -> None:
    """A heading that is a message, in code font, is text of the source: with ... where a value stands."""
    source = "\n".join(
        strings(path)
        for path in (*sorted((ROOT / "lightning_entropy").rglob("*.py")), *sorted((ROOT / "recipes").rglob("*.py")))
    )
    messages = re.findall(r"^### `(.+)`$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    assert len(messages) >= 20
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in source, f"docs/faq.md: no message of ours has {part.strip()!r}"


def strings(path: Path) -> str:
    """Return all strings of a module, a line each; of an f-string the parts that are fixed, with nothing between."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("\0".join(str(v.value) for v in node.values if isinstance(v, ast.Constant)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)
