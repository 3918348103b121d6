"""What a checkpoint says of the run that wrote it, compared with the run that goes on from it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Size
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_entropy.engine.formats import Rules, check_format, check_loop, check_values
from lightning_entropy.engine.loop import FORMAT as LOOP_FORMAT
from lightning_entropy.engine.outer_rules import OuterStep

_REQUIRED: Rules = {"loops": ("a list", lambda v: isinstance(v, list | tuple))}
_OPTIONAL: Rules = {  # a checkpoint of version 0.1 has none
    "method": (
        "a dict with perturb, a bool",
        lambda v: isinstance(v, Mapping) and isinstance(v.get("perturb"), bool),
    ),
    "optimizers": (
        "a list of class names",
        lambda v: isinstance(v, list | tuple) and all(isinstance(name, str) for name in v),
    ),
}


def check_state(
    owner: str,
    state: Any,
    newest: int,
    *,
    shapes: Mapping[str, Size | None] | None = None,
    outer: OuterStep | None = None,
) -> None:
    """Check all of a state, before any of it is used.

    Args:
        owner: whose state it is, by its class.
        state: as it was saved.
        newest: its newest format that is understood.
        shapes: :func:`shapes_of` what it is for, where that is known by now.
        outer: the outer step that it is for, likewise.

    Raises:
        ValueError: a newer format, a missing key, a value of the wrong type or range, a parameter of another name or
            shape, or the state of another outer optimizer: what is wrong, and the way out.
    """
    what = f"the state of {owner} in a checkpoint"
    try:
        check_format(what, state, newest)
        check_values(what, state, _REQUIRED, _OPTIONAL)
        for i, loop in enumerate(state["loops"]):
            where = f"loops[{i}] in {what}"
            check_loop(where, loop, LOOP_FORMAT, shapes)
            if outer is not None:
                outer.check_state(where, loop["outer"])
    except ValueError as error:
        raise ValueError(
            f"{error}. Resume from another checkpoint, or go on from this one's weights alone: load_from_checkpoint, "
            "and fit without ckpt_path"
        ) from None


def loop_of_callback(checkpoint: Mapping[str, Any]) -> str | None:
    """Return the state key of a callback in a checkpoint that drives loops; None where there is none."""
    for key, state in checkpoint.get("callbacks", {}).items():
        if isinstance(state, dict) and {"format", "loops", "method"} <= state.keys():
            return str(key)
    return None


def warn_of_another(owner: str, other: str) -> None:
    """Warn that a checkpoint has the loop's state of an object that this run does not have.

    Args:
        owner: class of this run's callback or strategy.
        other: class, or state key, of the checkpoint's.
    """
    rank_zero_warn(
        f"the checkpoint's loop is of {other.partition('{')[0]}, not of {owner}: it is not loaded, and a new loop "
        "begins at its x"
    )


def shapes_of(module: Module, optimizers: Sequence[Optimizer]) -> dict[str, Size | None]:
    """Return the shapes of all parameters that a state may speak of; None where there is none yet.

    All of the module's: which optimizer has which may change between now and the first batch (in finetuning).
    """
    named = dict(module.named_parameters())
    known = set(named.values())
    for optimizer in optimizers:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        named |= {str(i): p for i, p in enumerate(params) if p not in known}
    return {name: None if is_lazy(p) else p.shape for name, p in named.items()}


def check_method(state: Mapping[str, Any], now: Mapping[str, Any], seed: int | None) -> None:
    """Warn, in one line, of settings that differ from the checkpoint's.

    Args:
        state: of a callback or strategy, with its "method" (a checkpoint of version 0.1 has none).
        now: this run's: :meth:`Relaxation.describe` and what else matters, as plain values.
        seed: of this run, where it was given.

    Raises:
        MisconfigurationException: a method whose state cannot be used.
    """
    then = state.get("method")
    if then is not None:
        if then.get("perturb", False) != now["perturb"]:
            raise MisconfigurationException(
                f"perturb must be {then['perturb']} to go on from this checkpoint, got {now['perturb']}: the state of "
                "one kind of loop cannot be the other's. Load the weights with load_from_checkpoint, and fit without "
                "ckpt_path"
            )
        changes = [
            f"{name} was {then[name]}, is {now[name]}" for name in now if name in then and then[name] != now[name]
        ]
        if changes:
            rank_zero_warn(f"the checkpoint is of another method: {'; '.join(changes)}. It goes on with the new one")
    seeds = [loop["seed"] for loop in state.get("loops", [])]
    if seed is not None and seeds and seeds[0] != seed:
        rank_zero_warn(f"seed = {seed} has no effect: the noise goes on with the checkpoint's seed, {seeds[0]}")


def check_loadable(state: Mapping[str, Any], optimizers: Sequence[Optimizer], states: Sequence[Any]) -> None:
    """Refuse an optimizer of another class than the checkpoint's if it cannot load that one's state.

    Args:
        state: of a callback or strategy, with its "optimizers"; without it nothing is known.
        optimizers: of this run.
        states: theirs in the checkpoint.

    Raises:
        MisconfigurationException: loading fails, on a copy.
    """
    for i, (optimizer, then, content) in enumerate(zip(optimizers, state.get("optimizers", []), states, strict=False)):
        now = type(optimizer).__name__
        if now == then:
            continue
        try:
            copy.deepcopy(optimizer).load_state_dict(content)
        except Exception as error:
            raise _other_class(i, then, now) from error


def _other_class(i: int, then: str, now: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"optimizer {i} must be {then} to go on from the checkpoint's state, got {now}, which keeps another: "
        "load the weights with load_from_checkpoint, and fit without ckpt_path"
    )


def check_states(state: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
    """Compare the optimizers with the checkpoint's, whose state they were given.

    Args:
        state: of a callback or strategy, with its "loops" and "optimizers" (a checkpoint of version 0.1 has only the
            first).
        optimizers: of this run, with their states loaded.

    Raises:
        MisconfigurationException: another number of optimizers, or a class that is neither a base nor a subclass of the
            checkpoint's and so cannot use its state.
    """
    if len(state["loops"]) != len(optimizers):
        raise MisconfigurationException(
            f"the checkpoint must be of {len(optimizers)} optimizers, got {len(state['loops'])}: "
            "use the module that wrote it, or drop the callback's state from it"
        )
    for i, (optimizer, then) in enumerate(zip(optimizers, state.get("optimizers", []), strict=False)):
        now = type(optimizer).__name__
        if now == then:
            continue
        related = {kind.__name__ for kind in (*type(optimizer).__mro__, *type(optimizer).__subclasses__())}
        if then not in related:
            raise _other_class(i, then, now)
        rank_zero_warn(f"optimizer {i} was {then} in the checkpoint and is {now}: it goes on from the other's state")
