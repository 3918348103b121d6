"""Every command line but LightningCLI's: each option has a text, and a misspelt one ends in two lines."""

import argparse
import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
ROOT = Path(__file__).parents[2]


def commands() -> list[tuple[str, ...]]:
    found = []
    for path in sorted(
        (*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("recipes/**/*.py"), *ROOT.glob("lightning_*/**/*.py"))
    ):
        text = path.read_text()
        if re.search(r"\b(Options|Parser|ArgumentParser)\(", text) and '__name__ == "__main__"' in text:
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append((name.removesuffix(".__main__"),))
    return [*found, ("recipes.compare", "lm"), ("recipes.compare", "strength")]


class Read(Exception):
    """A command line is about to be read."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")
@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_option_has_a_text_and_a_misspelt_one_ends_in_two_lines(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Read(parser)

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read)
    monkeypatch.setattr(sys, "argv", list(command))
    with pytest.raises(Read) as caught:
        runpy.run_module(command[0], run_name="__main__")
    (parser,) = caught.value.args
    for action in parser._actions:
        assert action.help, f"{command}: {action.dest}"
    required = [a for a in parser._actions if a.required]
    given = [word for a in required for word in (*a.option_strings[:1], str(next(iter(a.choices or ["3"]))))]
    option = next(o for a in parser._actions for o in a.option_strings if o.startswith("--") and o != "--help")
    with pytest.raises(SystemExit) as end:
        parse(parser, [f"{option[:-1]}z=3", *given])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(said) == 2, said
