"""What a loop keeps of every parameter: x, z and, while the parameter shows x, y."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(eq=False)
class Slot:
    """What a loop keeps of one parameter, in float32 or the parameter's own wider type."""

    param: Tensor
    anchor: Tensor
    average: Tensor | None = None
    gradient: Tensor | None = None  # sum over a loop: the heat variant's, and that which gamma="auto" measures
    hidden: Tensor | None = None  # y, while the parameter shows x
    given: Tensor | None = None  # what it shows instead of x (the consensus of replicas)
    moved: bool = False  # since the last outer step
    replaced: bool = False  # x was, since the mean over replicas was started

    @property
    def inner(self) -> Tensor:
        """The inner iterate y."""
        return self.param.detach() if self.hidden is None else self.hidden

    @property
    def mean(self) -> Tensor:
        """The running mean z, which is y where there is none."""
        return self.inner.to(self.anchor.dtype) if self.average is None else self.average

    def running_mean(self) -> Tensor:
        """Give z to be updated; it starts at x."""
        if self.average is None:
            self.average = self.anchor.clone()
        return self.average

    def add_gradient(self, scale: Tensor | None) -> None:
        """Add the parameter's gradient, which is ``scale`` times too large, to the sum."""
        grad = self.param.grad
        assert grad is not None
        grad = (grad.to_dense() if grad.is_sparse else grad).to(self.anchor.dtype, copy=self.gradient is None)
        if scale is not None:
            grad = grad / scale
        self.gradient = grad if self.gradient is None else self.gradient.add_(grad)


class Slots:
    """The slots of an optimizer's parameters, each made when its parameter first gets a gradient.

    Until then x and y are the parameter's value, so that weights may be loaded, frozen and unfrozen freely.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[Tensor, str] | None = None) -> None:
        """Start with none; ``names`` keys the state, and a parameter without a name goes by its position."""
        self._optimizer = optimizer
        self._names = names or {}
        self._slots: dict[Tensor, Slot] = {}

    @property
    def params(self) -> list[Tensor]:
        """All parameters of the optimizer, in its order."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def __contains__(self, p: Tensor) -> bool:
        return p in self._slots

    def __getitem__(self, p: Tensor) -> Slot:
        """Give the parameter's slot, made here if there is none."""
        slot = self._slots.get(p)
        if slot is None:
            wide = torch.promote_types(p.dtype, torch.float32)
            slot = Slot(p, p.detach().to(wide, copy=True, memory_format=torch.preserve_format))
            self._slots[p] = slot
        return slot

    def stepping(self) -> tuple[list[Slot], list[Any]]:
        """Give the slots of the parameters that have a gradient now, and their learning rates."""
        slots, lrs = [], []
        for group in self._optimizer.param_groups:
            lr = group.get("lr", 0.0)
            lr = float(lr) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else lr
            for p in group["params"]:
                if p.grad is not None:
                    slots.append(self[p])
                    lrs.append(lr)
        return slots, lrs

    def show(self) -> None:
        """Put x into the parameters, keeping y beside."""
        # All copies before the first write: there may be no memory for them, and parameters may share theirs.
        inner = [slot.param.detach().clone() for slot in self]
        for slot, y in zip(self, inner, strict=True):
            slot.hidden = y
        for slot in self:
            slot.param.copy_(slot.anchor)

    def give(self, values: Mapping[Tensor, Tensor]) -> None:
        """Put other values than x into some parameters, after :meth:`show` or where y is x."""
        for slot in self:
            if slot.param in values:
                slot.given = values[slot.param]
                slot.param.copy_(slot.given)

    def adopt(self) -> None:
        """Take as the new x what was put into a parameter since it shows x; y and z restart there."""
        slots = list(self)
        shown = [slot.anchor if slot.given is None else slot.given for slot in slots]
        # The values are compared on the device and waited for once.
        changed = [(slot.param != value.to(slot.param.dtype)).any() for slot, value in zip(slots, shown, strict=True)]
        for slot, new in zip(slots, [flag.item() for flag in changed], strict=True):
            if new:
                slot.anchor.copy_(slot.param)
                slot.average = slot.hidden = slot.given = None
                slot.moved, slot.replaced = False, True

    def hide(self) -> None:
        """Put y back, but where a new x was put into the parameter."""
        self.adopt()
        for slot in self:
            if slot.hidden is not None or slot.given is not None:
                slot.param.copy_(slot.anchor if slot.hidden is None else slot.hidden)
            slot.hidden = slot.given = None

    def named(self) -> Iterator[tuple[str, Slot]]:
        """Give every slot with its key in the state."""
        for i, p in enumerate(self.params):
            if p in self._slots:
                yield self._names.get(p, str(i)), self._slots[p]

    def load(self, entries: Mapping[str, Mapping[str, Any]], *, shown: bool) -> None:
        """Make the slots again from saved entries: x from ``anchor``, or else from the parameter.

        Args:
            entries: by name, the saved fields of a slot (``inner`` for y).
            shown: whether the parameters are to hold x afterwards, with y beside; else y.

        Raises:
            ValueError: a name that the optimizer does not have, or a tensor of another shape.
        """
        by_name = {self._names.get(p, str(i)): p for i, p in enumerate(self.params)}
        for name, entry in entries.items():
            if name not in by_name:
                raise ValueError(f"state_dict must be of the optimizer's parameters, got {name!r}, which is not one")
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.shape != by_name[name].shape:
                    shapes = f"{tuple(value.shape)} for {name!r} of shape {tuple(by_name[name].shape)}"
                    raise ValueError(f"{key} in state_dict must have the parameter's shape, got {shapes}")
        self._slots = {}
        for name, entry in entries.items():
            p = by_name[name]
            if "anchor" in entry:
                p.copy_(entry["anchor"])
            slot = self[p]
            if "anchor" in entry:
                slot.anchor.copy_(entry["anchor"])
            slot.moved = entry.get("moved", False)
            for key in ("average", "gradient"):
                if key in entry:
                    setattr(slot, key, torch.empty_like(slot.anchor).copy_(entry[key]))
            if "inner" in entry and shown:
                slot.hidden = torch.empty_like(p).copy_(entry["inner"])
            elif "inner" in entry:
                p.copy_(entry["inner"])
