"""x, y and z of one parameter, and what is done with those of several at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine import shards


@dataclass(eq=False)
class Weight:
    """The state of one parameter, in float32 or the parameter's own wider type.

    Of a parameter that is sharded over ranks, all but itself is of this rank's part: plain tensors, whatever it is.
    """

    param: Tensor
    anchor: Tensor  # in the host's memory, where it is offloaded
    average: Tensor | None = None
    gradient: Tensor | None = None  # summed over a loop, for their mean
    kept: Tensor | None = None  # y, while the parameter holds another value; the anchor itself where y is x
    stand_in: Tensor | None = None  # the value that it holds instead of x
    moved: bool = False  # since the last outer step
    replaced: bool = False  # x was, since the mean over replicas was started
    sent: Tensor | None = None  # the pseudo-gradient whose mean over replicas is under way
    fragment: int = 0  # with which it was sent
    shown_version: int = 0  # of the parameter, when x was put into it
    whole: Tensor | None = None  # see whole_anchor
    home: Tensor | None = None  # where an offloaded anchor is put when it is not needed any more

    @property
    def value(self) -> Tensor:
        """What the parameter holds, by reference: itself, or this rank's part of it."""
        return shards.local(self.param)

    @property
    def whole_anchor(self) -> Tensor:
        """The anchor x as the parameter is placed, always the same object: an optimizer's state is by it."""
        if self.whole is None:
            self.whole = self.anchor if self.param is self.value else shards.whole(self.anchor, self.param)
        return self.whole

    @property
    def near_anchor(self) -> Tensor:
        """The anchor x on the parameter's device; this rank's part of it."""
        return self.anchor.to(self.value.device, non_blocking=True)

    @property
    def inner(self) -> Tensor:
        """The inner iterate y."""
        return self.value.detach() if self.kept is None else self.kept

    @property
    def mean(self) -> Tensor:
        """The running mean z, which is y where there is none."""
        return self.inner.to(self.anchor.dtype) if self.average is None else self.average

    def restart(self) -> None:
        """Set y and z to x."""
        self.value.copy_(self.anchor)
        self.average = self.kept = self.stand_in = None


def arrive(weights: Iterable[Weight]) -> None:
    """Wait for copies of anchors to the host's memory that may be under way, before the host reads it."""
    devices = {w.value.device for w in weights if w.anchor.device != w.value.device}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def running_means(weights: Sequence[Weight]) -> list[Tensor]:
    """Return z of some weights, to be updated in place. It starts at x."""
    new = [w for w in weights if w.average is None]
    for w, z in zip(new, F.copies([w.anchor for w in new]), strict=True):
        w.average = z
    return [w.mean for w in weights]


def means_of(weights: Sequence[Weight]) -> list[Tensor]:
    """Return z of some weights, in x's precision."""
    found = [w.inner if w.average is None else w.average for w in weights]
    narrow = [i for i, (w, z) in enumerate(zip(weights, found, strict=True)) if z.dtype != w.anchor.dtype]
    wide = F.copies([found[i] for i in narrow], like=[weights[i].anchor for i in narrow])
    for i, z in zip(narrow, wide, strict=True):
        found[i] = z
    return found


def add_gradients(weights: Sequence[Weight], scale: Tensor | None) -> None:
    """Add the parameters' gradients, which are ``scale`` times too large, to their sums."""
    found = [shards.gradient_of(w.param) for w in weights]
    grads = [g.to_dense() if g.is_sparse else g for g in found if g is not None]
    narrow = [i for i, (w, g) in enumerate(zip(weights, grads, strict=True)) if g.dtype != w.anchor.dtype]
    wide = F.copies([grads[i] for i in narrow], like=[weights[i].anchor for i in narrow])
    for i, g in zip(narrow, wide, strict=True):
        grads[i] = g
    if scale is not None and grads:
        grads = list(torch._foreach_div(grads, scale))
    new = [i for i, w in enumerate(weights) if w.gradient is None]
    for i, gradient in zip(new, F.copies([grads[i] for i in new]), strict=True):
        weights[i].gradient = gradient
    others = sorted(set(range(len(weights))) - set(new))
    sums = [w.gradient for w in (weights[i] for i in others) if w.gradient is not None]
    if sums:
        torch._foreach_add_(sums, [grads[i] for i in others])
