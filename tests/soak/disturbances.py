"""What happens to a training, and when: moments are counted in calls of functions, so that a round can be repeated."""

import os
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning_entropy
from tests.soak import trainings

ANYWHERE, OURS = "anywhere", "in our code"
_PACKAGE = str(Path(lightning_entropy.__file__).parent)
_USER = trainings.__file__


class Hurt(Exception):
    """What a user's code raises."""


def places(frame: FrameType) -> list[str]:
    """Return of which places a call is: everywhere, in our code, and a user's hook by name."""
    code = frame.f_code
    found = [ANYWHERE]
    if code.co_filename.startswith(_PACKAGE):
        found.append(OURS)
    elif code.co_filename == _USER and code.co_name in trainings.HOOKS:
        found.append(code.co_name)
    return found


def watched(work: Callable[[], Any], on_call: Callable[[str, int], None]) -> tuple[Any, dict[str, int]]:
    """Run a function and count its calls by place.

    Args:
        work: called without arguments.
        on_call: told every place and its count, at every call.

    Returns:
        What the function returned, and the counts.
    """
    counts: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        for place in places(frame):
            counts[place] += 1
            on_call(place, counts[place])

    sys.setprofile(profile)
    try:
        return work(), dict(counts)
    finally:
        sys.setprofile(None)


@dataclass(frozen=True)
class Disturbance:
    """Something that happens at the n-th call in some place.

    Attributes:
        kind: a key of KINDS.
        place: ANYWHERE, OURS, or a user's hook.
        number: n, from 1. Beyond the training's last call, nothing happens.
        size: where a file ends on the full disk, in bytes.
    """

    kind: str
    place: str
    number: int
    size: int = 0

    @classmethod
    def drawn(cls, draw: random.Random, kind: str, calls: dict[str, int], *, at_hooks: bool) -> "Disturbance":
        """Return a random one.

        Args:
            draw: random numbers.
            kind: a key of KINDS.
            calls: counts of a whole training.
            at_hooks: only in user's hooks, which a training without us has too.
        """
        hooks = [name for name in trainings.HOOKS if name in calls]
        if kind == "full disk":
            place = "on_save_checkpoint"
        elif kind == "exception" or at_hooks:
            place = draw.choice(hooks)
        else:
            place = draw.choice([ANYWHERE, OURS, OURS, draw.choice(hooks)])
        return cls(kind, place, draw.randint(1, max(calls.get(place, 1), 1)), draw.choice([0, 100, 2000, 5000]))

    def strike(self, place: str, number: int) -> None:
        """Happen, if it is time to."""
        if (place, number) == (self.place, self.number):
            KINDS[self.kind](self)


def _raise(disturbance: Disturbance) -> None:
    raise Hurt(f"in {disturbance.place}")


def _fill(disturbance: Disturbance) -> None:
    soft = disturbance.size
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))  # Python ignores the signal: EFBIG


KINDS: dict[str, Callable[[Disturbance], None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda _: os.kill(os.getpid(), signal.SIGINT),
    "exception": _raise,
    "full disk": _fill,
}
