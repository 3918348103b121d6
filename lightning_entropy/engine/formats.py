"""What every saved state is asked before any of it is used: of which format it is, and whether it is whole.

Somebody else's file, or a damaged one, is one error that names key, rule and value, and changes nothing.
"""

import reprlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Size, Tensor

# By key: what a value must be, in words and as a predicate.
Rules = Mapping[str, tuple[str, Callable[[Any], bool]]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 0


def _is_outer(value: Any) -> bool:
    if value is None:
        return True
    if not (isinstance(value, Mapping) and isinstance(value.get("options"), list | tuple)):
        return False
    state = value.get("state")
    return isinstance(state, Mapping) and all(isinstance(v, Mapping) for v in (*value["options"], *state.values()))


_LOOP: Rules = {
    "inner_step": ("an int >= 0", _is_count),
    "outer_step": ("an int >= 0", _is_count),
    "seed": ("an int >= 0", _is_count),
    "slots": ("a dict of dicts", lambda v: isinstance(v, Mapping) and all(isinstance(w, Mapping) for w in v.values())),
    "outer": ("None, or a dict with options and state, of dicts", _is_outer),
}
_SLOT: Rules = {
    **{key: ("a tensor", lambda v: isinstance(v, Tensor)) for key in ("anchor", "inner", "average", "gradient")},
    "moved": ("a bool", lambda v: isinstance(v, bool)),
    "sent": ("a tensor", lambda v: isinstance(v, Tensor)),
    "fragment": ("an int >= 0", _is_count),
}


def check_format(what: str, state: Mapping[str, Any], newest: int) -> int:
    """Return the format of a saved state: 1, version 0.1's, where it has none.

    Args:
        what: the state, for the message.
        state: as it was saved.
        newest: the newest format that is understood.

    Raises:
        ValueError: no dict, or a newer one.

    Example:
        >>> check_format("state_dict", {"format": 2}, 2), check_format("state_dict", {}, 2)
        (2, 1)
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{what} must be a dict, got {reprlib.repr(state)}")
    found = state.get("format", 1)
    if not isinstance(found, int) or found > newest:
        raise ValueError(
            f"{what} must be of format {newest} or older, got format {found!r}: "
            "load it with the version of lightning_entropy that wrote it, or a newer one"
        )
    return found


def check_values(what: str, state: Mapping[str, Any], required: Rules, optional: Rules | None = None) -> None:
    """Check the values of a state by key; keys without a rule are not looked at.

    Raises:
        ValueError: a missing key, or a value that breaks its rule: both, and what was found.

    Example:
        >>> check_values("state_dict", {"t": "3"}, {"t": ("an int", lambda value: isinstance(value, int))})
        Traceback (most recent call last):
        ValueError: t in state_dict must be an int, got '3'
    """
    for key, (rule, holds) in required.items():
        if key not in state:
            raise ValueError(f"{what} must have {key}, {rule}, got the keys {reprlib.repr(sorted(map(str, state)))}")
        _check(f"{key} in {what}", state[key], rule, holds)
    for key, (rule, holds) in (optional or {}).items():
        if key in state:
            _check(f"{key} in {what}", state[key], rule, holds)


def check_loop(what: str, state: Mapping[str, Any], newest: int, shapes: Mapping[str, Size | None] | None) -> None:
    """Check all that the state of a loop holds, before it is loaded.

    Args:
        what: the state, for the message.
        state: of :meth:`InnerOuter.state_dict`.
        newest: the newest format that is understood.
        shapes: of the parameters by their names in it, None for a shape that is not known; None: of other parameters
            nothing is known yet.

    Raises:
        ValueError: a newer format, a missing key, a value of the wrong type or range, a parameter of another name, or a
            tensor of another shape.
    """
    check_format(what, state, newest)
    check_values(what, state, _LOOP)
    for name, slot in state["slots"].items():
        if shapes is not None and name not in shapes:
            names = reprlib.repr(list(shapes))
            raise ValueError(f"slots in {what} must be of the parameters {names}, got {name!r}, which is not one")
        where = f"slots[{name!r}] in {what}"
        # y is saved with whether it has moved.
        check_values(where, slot, {k: _SLOT[k] for k in ("inner", "moved")} if "inner" in slot else {}, _SLOT)
        shape = None if shapes is None else shapes[name]
        for key, value in slot.items():
            if isinstance(value, Tensor) and shape is not None and value.shape != shape:
                raise ValueError(
                    f"{key} of {where} must have the parameter's shape, {tuple(shape)}, got {tuple(value.shape)}"
                )


def without_measured_gamma(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a loop's state without what ``gamma="auto"`` of format 1 had measured, and warn of what that was.

    Args:
        state: of any format, checked.
    """
    if state.get("measured"):  # in the first loop, whose gradients it summed
        warnings.warn('the state is of gamma="auto", which is gone: write what gamma is to be', stacklevel=3)
        slots = {name: {k: v for k, v in slot.items() if k != "gradient"} for name, slot in state["slots"].items()}
        return {**state, "slots": slots}
    if state.get("gamma_start") is not None:
        warnings.warn(
            f'the state is of gamma="auto", which is gone and had measured {state["gamma_start"]} for outer step 1: '
            "that spring is gamma=Scoping(measured / 1.001, 0.001)",
            stacklevel=3,
        )
    return state


def _check(what: str, value: Any, rule: str, holds: Callable[[Any], bool]) -> None:
    if not holds(value):
        raise ValueError(f"{what} must be {rule}, got {reprlib.repr(value)}")
