"""Weights that somebody writes after a step, as one does to keep a constraint (clamped or normalised weights)."""

from torch import Tensor

from lightning_entropy.engine.torch_internals import version
from lightning_entropy.engine.weight import Weight
from lightning_entropy.engine.weights import Weights


class Constraints:
    """Which weights were written between a step and whatever writes them next in the loop.

    Args:
        weights: of the loop.
        watched: whether anything is noted.
    """

    def __init__(self, weights: Weights, *, watched: bool) -> None:
        self._weights = weights
        self._watched = watched
        self._versions: dict[Tensor, int] = {}  # of the parameters, as the last step left them
        self._written: list[Weight] = []

    def watch(self) -> None:
        """Begin anew: a step has just been taken."""
        self.forget()
        self.go_on()

    def go_on(self) -> None:
        """Watch on after :meth:`note`, when the loop itself has written."""
        if self._watched:
            self._versions = {w.param: version(w.param) for w in self._weights}

    def forget(self) -> None:
        """Note nothing until the next step."""
        self._versions, self._written = {}, []

    def note(self) -> None:
        """Note what has been written since the step, before the loop itself writes."""
        known = [w for w in self._weights if w.param in self._versions]
        self._written += [w for w in known if self._versions[w.param] != version(w.param)]
        self._versions = {}

    def kept(self) -> list[tuple[Weight, Tensor]]:
        """Return the weights that have been written since the step, each with a copy of what it holds now."""
        self.note()
        return [(w, w.value.detach().clone()) for w in self._written]
