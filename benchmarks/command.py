"""The command lines of the benchmarks: every option with its text and default, every mistake in two lines."""

import argparse
import difflib
import re
import sys
from typing import NoReturn


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False or action.default == []
        return action.help if unset else super()._get_help_string(action)


class Options(argparse.ArgumentParser):
    """argparse's, named as the module is run, whose errors name the option that was probably meant."""

    def __init__(self, description: str | None) -> None:
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        name = None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"
        super().__init__(name, description=description, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        """End the process with the message.

        Raises:
            SystemExit: always, with status 2.
        """
        options = [option for action in self._actions for option in action.option_strings]
        found = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        near = difflib.get_close_matches(found[1], options, 1) if found else []
        meant = f". Did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {message}{meant}\n{self.prog} --help lists the options\n")
