"""Tensors that no loop tracks and that show another value for a while."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_entropy.engine.arithmetic import differ


class Substitutes:
    """Other values put into tensors for a while: buffers, and parameters that no loop tracks."""

    def __init__(self) -> None:
        self.depth = 0  # calls of show
        self._own: list[tuple[Tensor, Tensor, Tensor]] = []  # tensor, what it was given, its own value

    @property
    def shown(self) -> bool:
        """Whether someone looks."""
        return self.depth > 0

    def show(self, values: Mapping[Tensor, Tensor]) -> None:
        """Put the values in; calls nest, and inner ones change nothing."""
        if self.depth == 0:
            self._own = [(tensor, value, tensor.detach().clone()) for tensor, value in values.items()]
            for tensor, value, _ in self._own:
                tensor.copy_(value)
        self.depth += 1  # last: there may be no memory for the copies

    def hide(self) -> None:
        """Put the tensors' own values back where nothing was written since."""
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0:
            for (tensor, _, own), new in zip(self._own, self._written(), strict=True):
                if not new:
                    tensor.copy_(own)
            self._own = []

    def own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors' own values, which a write since :meth:`show` has replaced."""
        values = {t: own for (t, _, own), new in zip(self._own, self._written(), strict=True) if not new}
        return [values.get(t, t.detach()) for t in tensors]

    def _written(self) -> list[bool]:
        return differ((tensor, given) for tensor, given, _ in self._own)
