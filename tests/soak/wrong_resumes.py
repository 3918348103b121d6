"""Resumes with something wrong, and what must be said of each."""

import copy
import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.soak.trainings import METHODS, PLAIN, Training

# What torch says of a file that is cut off, under Lightning's way to open files.
CUT_OFF = r"PytorchStreamReader|Ran out of input|UnpicklingError|EOF|Invalid argument"
LEFT_OVER = "callbacks used to create the checkpoint need to be provided"


@dataclass
class WrongResume:
    """A resume with something wrong.

    Attributes:
        training: that resumes.
        checkpoint: from which.
        refused: pattern of the error; None: it goes on.
        warned: pattern of a warning; None: there is none to expect. With both, either is right.
        harmless: whether it may also end where the undisturbed one does, as what was damaged is not needed.
        what: in words.
    """

    training: Training
    checkpoint: Path
    refused: str | None = None
    warned: str | None = None
    harmless: bool = False
    what: str = ""


def drawn(draw: random.Random, training: Training, checkpoint: Path, folder: Path) -> tuple[str, WrongResume]:
    """Return a random one that this training can have, with its name; changed files are written into the folder."""
    choices = [name for name, (_, possible) in KINDS.items() if possible(training)]
    name = draw.choice(choices)
    folder.mkdir()
    return name, KINDS[name][0](draw, training, checkpoint, folder)


def _method(draw: random.Random, training: Training, checkpoint: Path, folder: Path) -> WrongResume:
    now = _described(training)
    others = [dataclasses.replace(training, method=name) for name in METHODS]
    other = draw.choice([other for other in others if _described(other) != now])
    if type(training.callback()) is not type(other.callback()):  # whose state is left alone, which Lightning says
        return WrongResume(other, checkpoint, warned=LEFT_OVER, what=other.method)
    if _described(other)["perturb"] != now["perturb"]:
        refused = f"perturb must be {now['perturb']} to go on from this checkpoint"
        return WrongResume(other, checkpoint, refused=refused, what=other.method)
    refused = (
        r"outer in loops\[0\] in .* must be of an optimizer with options" if _outer(other) != _outer(training) else None
    )
    warned = "the checkpoint is of another method: "
    return WrongResume(other, checkpoint, refused=refused, warned=warned, what=other.method)


def _outer(training: Training) -> str | None:
    """Return which outer optimizer a training has, whose state is no other's."""
    callback = training.callback()
    assert callback is not None
    return "adam" if callback.outer else "nesterov" if callback.relaxation.outer_momentum else None


def _steps(draw: random.Random, training: Training, checkpoint: Path, folder: Path) -> WrongResume:
    n = training.inner_steps
    other = dataclasses.replace(training, inner_steps=draw.choice([m for m in (1, 2, 4, 9) if m != n]))
    return WrongResume(other, checkpoint, warned=f"inner_steps was {n}, is {other.inner_steps}", what=f"{other}")


def _optimizer(draw: random.Random, training: Training, checkpoint: Path, folder: Path) -> WrongResume:
    name = "adamw" if training.optimizer == "sgd" else "sgd"
    then = {"sgd": "SGD", "adamw": "AdamW"}[training.optimizer]
    other = dataclasses.replace(training, optimizer=name)
    return WrongResume(other, checkpoint, refused=f"optimizer 0 must be {then} to go on", what=name)


def _seed(draw: random.Random, training: Training, checkpoint: Path, folder: Path) -> WrongResume:
    other = dataclasses.replace(training, seed=training.seed + 2 - training.seed % 2)
    return WrongResume(other, checkpoint, warned=f"seed = {other.seed} has no effect", what=f"{other.seed}")


def _without(draw: random.Random, training: Training, checkpoint: Path, folder: Path) -> WrongResume:
    return WrongResume(training.plain, checkpoint, warned=LEFT_OVER)


def _truncated(draw: random.Random, training: Training, checkpoint: Path, folder: Path) -> WrongResume:
    content = checkpoint.read_bytes()
    size = draw.randrange(len(content))
    cut = folder / "cut.ckpt"
    cut.write_bytes(content[:size])
    return WrongResume(training, cut, refused=CUT_OFF, what=f"{size} of {len(content)} bytes")


def _malformed(draw: random.Random, training: Training, checkpoint: Path, folder: Path) -> WrongResume:
    content = torch.load(checkpoint, weights_only=True)
    name = type(training.callback()).__name__
    content["callbacks"][name], what = damaged(draw, content["callbacks"][name])
    file = folder / "malformed.ckpt"
    torch.save(content, file)
    return WrongResume(
        training, file, refused=rf"^ValueError: .*the state of {name} in a checkpoint", harmless=True, what=what
    )


KINDS: dict[str, tuple[Callable[..., WrongResume], Callable[[Training], bool]]] = {
    "another method": (_method, lambda training: True),
    "another L": (_steps, lambda training: training.method != "two_timescale"),
    "another optimizer": (_optimizer, lambda training: training.module != "pair"),
    "another seed": (_seed, lambda training: training.method != "hamilton_jacobi"),
    "without us": (_without, lambda training: True),
    "truncated checkpoint": (_truncated, lambda training: True),
    "malformed state": (_malformed, lambda training: True),
}


def _described(training: Training) -> Any:
    callback = training.callback()
    assert callback is not None, f"a method must be one of ours, got {PLAIN}"
    return callback.relaxation.describe()


# May be missing: other versions or methods write none.
OPTIONAL = ("format", "method", "optimizers", "average", "gradient", "anchor", "outer")
WRONG: tuple[Any, ...] = (None, "3", -1, 1.5, [], {}, [1, 2], {"a": 1}, True)


def damaged(draw: random.Random, state: Any) -> tuple[Any, str]:
    """Return a copy of a callback's state with one thing wrong, and what."""
    state = copy.deepcopy(state)
    places = [
        place for place in _places(state) if not {"method", "state"} & {*place[:-1]} and "options" not in place[:-2]
    ]
    *above, last = draw.choice([p for p in places if p])
    parent = state
    for key in above:
        parent = parent[key]
    value = parent[last]
    ways = ["type"]
    if last not in OPTIONAL and isinstance(parent, dict) and "options" not in above:
        ways += ["missing"]
    if isinstance(value, Tensor):
        ways += ["shape"]
    if len(above) == 3 and above[-1] == "slots":
        ways = ["missing", "name"] if last in OPTIONAL else ["name", "type"]
    if last == "format":
        ways = ["newer"]
    way = draw.choice(ways)
    where = "/".join(map(str, (*above, last)))
    if way == "missing":
        del parent[last]
    elif way == "name":
        parent[f"another.{last}"] = parent.pop(last)
    elif way == "shape":
        parent[last] = nn.functional.pad(value, (0, 1)) if value.ndim else value.repeat(2)
    elif way == "newer":
        parent[last] = 99
    else:
        parent[last] = draw.choice([wrong for wrong in WRONG if not _allowed(last, wrong, value)])
    return state, f"{way} of {where}: {parent.get(last) if isinstance(parent, dict) else parent[last]!r}"


def _allowed(key: Any, wrong: Any, value: Any) -> bool:
    """Whether what is put in the place of a value is one that the key may have."""
    if key == "outer" and wrong is None:
        return True
    return type(wrong) is type(value) and wrong != -1


def _places(state: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [above]
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        found += _places(value, (*above, key))
    return found
