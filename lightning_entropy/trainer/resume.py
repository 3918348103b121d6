"""What a checkpoint says of the run that wrote it, compared with the run that goes on from it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer


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
