"""What is asked for and cannot be ends a command line with a sentence, no page of usage or traceback above it."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class Refused(ValueError):
    """What the command line asks for cannot be; the message says why."""


@contextmanager
def refusing() -> Iterator[None]:
    """Take a ValueError within for one about the command line.

    Raises:
        Refused: in its place.
    """
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error


def run(main: Callable[[], object]) -> None:
    """Run a command line. A file that is not there and what is refused end it in a sentence, anything else as ever.

    Raises:
        SystemExit: with that sentence.
    """
    try:
        main()
    except (Refused, FileNotFoundError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors have no usage above them and name the option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """End the process with the message.

        Raises:
            SystemExit: always, with status 2.
        """
        self.exit(2, explain(message, self))


def explain(message: str, parser: argparse.ArgumentParser) -> str:
    """Return a parser's message as the last words of a process, with what was probably meant.

    Example:
        >>> parser = argparse.ArgumentParser("try")
        >>> _ = parser.add_argument("--epochs")
        >>> print(explain("unrecognized arguments: --epohcs 3", parser), end="")
        error: unrecognized arguments: --epohcs 3. Did you mean --epochs?
        try --help lists the options
    """
    options = [option for action in parser._actions for option in action.option_strings]
    found = re.search(r"[Uu]nrecognized arguments: (--[^\s=]+)", message)  # jsonargparse has had both
    meant = _closest(found[1], options) if found else None
    found = re.search(r"File does not exist: '(.+)'", message)
    if found:
        path = Path(found[1])
        meant = _closest(path.name, (p.name for p in path.parent.glob("*.yaml")))
    message = _sentence(message)
    prog = parser.prog.replace(" [options]", "")
    return f"error: {message}{f'. Did you mean {meant}?' if meant else ''}\n{prog} --help lists the options\n"


def program() -> str | None:
    """Return how this process was started, where that was ``python -m``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def _sentence(message: str) -> str:
    r"""Return jsonargparse's list about a value as a sentence, and anything else as it is, in one line.

    Example:
        >>> lines = ['Parser key "data.files":', "Subtypes: [list[str], <class 'NoneType'>]", "Given value: x"]
        >>> _sentence("\n".join(lines))
        '--data.files must be list[str] or null, got x'
        >>> _sentence('Parser key "data.source":\n  Expected a typing.Literal[\'a\', \'b\']. Got value: x')
        "--data.source must be one of 'a', 'b', got x"
    """
    found = re.search(r'Parser key "(.+?)":\s+Expected an? typing\.Literal\[(.+)\]\. Got value: (.*)', message)
    if found:
        return f"--{found[1]} must be one of {found[2]}, got {found[3]}"
    found = re.search(r'Parser key "(.+?)":.*Subtypes: \[(.+)\]\n.*Given value: (.*)', message, re.DOTALL)
    if not found:
        return " ".join(message.split())
    name, types, value = found.groups()
    kinds = re.sub(r"<class '(.+?)'>", r"\1", types).replace("NoneType", "null").replace(", ", " or ")
    return f"--{name} must be {kinds}, got {value}"


def _closest(word: str, words: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(words), n=1)), None)
