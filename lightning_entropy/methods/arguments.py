"""Arguments by another name: the literature's, or misspelt."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# What papers and other packages call our arguments; the first that a function has is meant.
MEANT = {
    "L": ("inner_steps",),
    "H": ("inner_steps",),
    "K": ("inner_steps",),
    "k": ("inner_steps",),
    "la_steps": ("inner_steps",),
    "sync_every": ("inner_steps",),
    "langevin_iters": ("inner_steps",),
    "alpha": ("average", "mixing", "outer_lr"),
    "la_alpha": ("outer_lr",),
    "beta": ("average",),
    "eta": ("outer_lr",),
    "scope": ("gamma",),
    "scoping": ("gamma",),
    "eps": ("noise",),
    "epsilon": ("noise",),
    "sigma": ("width", "noise", "gamma"),
    "std": ("width", "gamma"),
    "radius": ("width", "gamma"),
    "tau": ("delay",),
    "elasticity": ("rho",),
}
OPTIMIZERS = ("lr", "learning_rate", "momentum", "weight_decay", "nesterov")


def named(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function say what was meant by a keyword argument that it does not have; for a class, its ``__init__``.

    Example:
        >>> @named
        ... def parle(inner_steps=25, gamma=1.0): ...
        >>> parle(L=20)
        Traceback (most recent call last):
        TypeError: parle has no argument 'L': it is inner_steps here
    """
    names = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        check_names(function.__qualname__.removesuffix(".__init__"), kwargs, names)
        return function(*args, **kwargs)

    return checked


def preset(function: Callable[P, T]) -> Callable[P, T]:
    """Do what :func:`named` does, and have a preset that stands among callbacks say that it was not called.

    Lightning calls ``setup`` of what it was given as a callback before all other hooks, under its ``state_key``, and
    ``on_exception`` when that has raised: the function has these attributes, and stays a plain function otherwise.

    Example:
        >>> @preset
        ... def lookahead(inner_steps=5): ...
        >>> lookahead.setup()
        Traceback (most recent call last):
        TypeError: lookahead is a preset and no callback: write callbacks=[InnerOuterCallback(lookahead())]
    """
    checked, name = named(function), function.__name__

    def setup(*args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{name} is a preset and no callback: write callbacks=[InnerOuterCallback({name}())]")

    for attribute, value in {"state_key": name, "setup": setup, "on_exception": ignore}.items():
        setattr(checked, attribute, value)
    return checked


def ignore(*args: Any, **kwargs: Any) -> None:
    """Do nothing: the hook of what is no callback, so that the error which says so is the only one."""


def check_names(owner: str, given: Iterable[str], names: list[str], method: Iterable[str] = ()) -> None:
    """Raise an error that says what was meant if an argument is given by a name that there is not.

    Args:
        owner: of the arguments, as it is called.
        given: names.
        names: that there are.
        method: arguments of the method that the owner takes.

    Raises:
        TypeError: a name that there is not.
    """
    for name in given:
        if name not in names:
            raise TypeError(f"{owner} has no argument {name!r}: {_hint(owner, name, names, list(method))}")


def _hint(owner: str, name: str, names: list[str], method: list[str]) -> str:
    def ours(known: list[str]) -> str | None:
        return next((meant for meant in (name, *MEANT.get(name, ())) if meant in known), None)

    if found := ours(names):
        return f"it is {found} here"
    if found := ours(method):
        return f"write {owner}(parle({found}=...)) or another method's"
    if name in OPTIMIZERS:
        return "it is your optimizer's"
    if close := difflib.get_close_matches(name, names, 1):
        return f"did you mean {close[0]}?"
    return f"it takes {', '.join(names) or 'none'}"
