"""A command line whose errors are a sentence each, and no page of usage."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

COMMAND = "python -m lightning_entropy.diagnostics"
_KINDS = {"float": "a number", "int": "an integer", "bool": "true or false", "NoneType": "null", "str": "text"}


class Parser(ArgumentParser):
    """jsonargparse's, which says what is wrong in a line.

    Attributes:
        options: The names of each command's.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.options: dict[str, set[str]] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the process with the message.

        Raises:
            SystemExit: with status 2; or jsonargparse's own error, for whoever has asked for it.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"error: {plain(message)}\n{COMMAND} report --help lists the options\n")


def plain(message: str) -> str:
    r"""Return jsonargparse's account of a value of the wrong kind as a sentence; others in one line.

    Example:
        >>> plain('Parser key "seed":\n  Expected a <class \'int\'>. Got value: x')
        "--seed must be an integer, got 'x'"
        >>> plain("two\n  lines")
        'two lines'
    """
    words = " ".join(message.split())
    found = re.match(r'Parser key "([\w.]+)": .*?(?:Given|Got) value: (?!type)(.*)$', words)
    kinds = [
        _KINDS[kind] for kind in dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", words)) if kind in _KINDS
    ]
    if found is None or not kinds:
        return words
    option = re.sub(r"^(module|data)_settings", r"\1", found[1])
    return f"--{option} must be {' or '.join(kinds)}, got {found[2].strip()!r}"


def check_words(words: Sequence[str], parser: Parser, checkpoints: Mapping[str, int]) -> None:
    """End the process where a command, an option or a checkpoint is missing or misspelt, with what was meant.

    Args:
        words: Of the command line.
        parser: That will read them.
        checkpoints: How many each command takes.

    Raises:
        SystemExit: Something is.
    """
    if {"--help", "-h"} & set(words):
        return
    if not words or words[0] not in checkpoints:
        got = f"got {words[0]!r}" if words else "got nothing"
        parser.error(f"the first word must be {' or '.join(checkpoints)}, {got}{_near(words[:1], checkpoints)}")
    command = words[0]
    known = parser.options[command]
    for word in words[1:]:
        name = word.split("=")[0]
        if name.startswith("--") and name not in known and not re.match(r"--(module|data)_settings\.", name):
            parser.error(f"{command} has no option {name}{_near([name], known)}")
    if not any(re.match(r"--module(=|$)", word) for word in words):
        parser.error(
            f"{command} needs --module package.Class or --module train.py:Class, the class that the checkpoint was "
            "trained with: a checkpoint holds weights and no code"
        )
    count = checkpoints[command]
    given = [word for word in words[1 : count + 1] if not word.startswith("-")]
    if len(given) < count and all(word.startswith("-") for word in words[1 + len(given) : 2 + len(given)]):
        parser.error(f"{command} takes {count} checkpoint{'s' if count > 1 else ''} after its name, got {len(given)}")


def _near(words: Sequence[str], known: Any) -> str:
    close = difflib.get_close_matches(words[0], list(known), 1, 0.5) if words else []
    return f": did you mean {close[0]}?" if close else ""
