"""What a name on the command line stands for: ``package.Class``, ``package:Class`` or ``train.py:Class``."""

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


class Refused(ValueError):
    """What is asked for cannot be had, or would import what nobody has named; the message says what to do."""


@contextmanager
def importing(*folders: str) -> Iterator[None]:
    """Let modules be imported from some folders, as a script's own is; "" is the working directory."""
    before = list(sys.path)
    sys.path[:0] = folders
    try:
        yield
    finally:
        sys.path[:] = before


def find(option: str, name: str) -> Any:
    """Import what a name stands for.

    Args:
        option: That the name was given for, for the messages.
        name: ``package.module.Class``, ``package.module:Class`` or ``path/script.py:Class``. A script is imported, so
            that what stands under ``if __name__ == "__main__"`` is not run.

    Returns:
        The object.

    Raises:
        Refused: It is not there, or cannot be imported.
    """
    where, _, inside = name.rpartition(":") if ":" in name else name.rpartition(".")
    if not where or not inside or name.endswith(".py"):
        path = name if name.endswith(".py") else "train.py"
        raise Refused(
            f"{option} must be an import path such as package.module.Class or {path}:Class, got {name!r}: "
            "what it is called there is missing"
        )
    found: Any = _script(option, name, Path(where)) if where.endswith(".py") else _module(option, name, where)
    for part in inside.split("."):
        if not hasattr(found, part):
            raise Refused(
                f"{option} must name what there is, got {name!r}: {where} has no {part!r}{_near(found, part)}"
            )
        found = getattr(found, part)
    return found


def _near(module: Any, name: str) -> str:
    public = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n, None))]
    close = difflib.get_close_matches(name, public, 3, 0.5)
    own = [n for n in public if getattr(getattr(module, n), "__module__", None) == getattr(module, "__name__", "")]
    names = close or own[:6]
    return f"; it has {', '.join(names)}" if names else ""


def _module(option: str, name: str, where: str) -> ModuleType:
    try:
        with importing(""):
            return importlib.import_module(where)
    except BaseException as error:
        raise _failed(option, name, where, error) from error


def _script(option: str, name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise Refused(
            f"{option} must name a script that there is, got {name!r}: no file {str(path)!r} in {os.getcwd()}"
        )
    path = path.resolve()
    loaded = sys.modules.get(path.stem)
    if loaded is not None:
        if getattr(loaded, "__file__", None) and Path(str(loaded.__file__)).resolve() == path:
            return loaded
        raise Refused(
            f"{option} must name a script whose name is its own, got {name!r}: there is a module {path.stem!r} "
            f"already, {getattr(loaded, '__file__', 'built in')}"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise Refused(f"{option} must name a Python script, got {name!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # what pickles, and dataclasses, look a class's module up in
    try:
        with importing(str(path.parent)):
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[path.stem]
        raise _failed(option, name, str(path), error) from error
    return module


def _failed(option: str, name: str, where: str, error: BaseException) -> BaseException:
    """Return a sentence on a failed import; what was meant to end the process, but not by the script, as it is."""
    if not isinstance(error, Exception | SystemExit):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name and (where == error.name or where.startswith(error.name)):
        return Refused(f"{option} must be an import path such as package.module.Class, got {name!r}: {said(error)}")
    return Refused(f"{option} {name}: importing {where} has failed with {said(error)}")


def said(error: BaseException) -> str:
    """Return an error in one line.

    Example:
        >>> said(KeyError("x")), said(ValueError("two" + chr(10) + "  lines"))
        ("KeyError: 'x'", 'ValueError: two lines')
    """
    words = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {words[:400]}{' ...' if len(words) > 400 else ''}" if words else type(error).__name__
    )
