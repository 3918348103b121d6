"""The command lines of the benchmarks: every option with its text and default, every mistake in two lines."""

import argparse
import sys

from recipes.messages import Parser


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False or action.default == []
        return action.help if unset else super()._get_help_string(action)


class Options(Parser):
    """The recipes' parser, named as the module is run, whose help shows the defaults."""

    def __init__(self, description: str | None) -> None:
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        name = None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"
        super().__init__(name, description=description, formatter_class=_Help)
