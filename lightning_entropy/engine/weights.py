"""The weights of one optimizer, and the one place that knows which of them a parameter holds."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine import shards
from lightning_entropy.engine.torch_internals import version
from lightning_entropy.engine.weight import Weight, arrive


class Holds(Enum):
    """What the parameters of a loop hold."""

    ANCHOR = auto()  # x: someone looks, or a loop is about to begin and y is x
    INNER = auto()  # y
    OTHER = auto()  # a value of neither: the consensus of replicas, or y + noise
    DETACHED = auto()  # whatever they held when the loop ended: nobody writes them any more


class Weights:
    """The weights of one optimizer's parameters, each tracked from its first gradient on.

    Until then x and y are the parameter's value, so that weights may be loaded, frozen and unfrozen freely. The same
    holds before the first step of every loop that restarts at x: the parameter is x, and whatever is written into it
    moves x.

    Args:
        optimizer: whose parameters.
        names: keys of the state; a parameter without a name goes by its position.
        tied: y is x at all times: an update of the parameter moves x itself.
        offloads: x is in the host's memory, where nothing needs it: see :meth:`fetched`.

    Attributes:
        holds: what the parameters hold.
        written: names of parameters that were written while they were shown, for whoever wants to say so.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[Tensor, str] | None = None,
        *,
        tied: bool = False,
        offloads: bool = False,
    ) -> None:
        self.holds = Holds.ANCHOR
        self.tied, self.offloads = tied, offloads
        self.written: list[str] = []
        self._optimizer = optimizer
        self._names = names or {}
        self._weights: dict[Tensor, Weight] = {}
        self._before: list[tuple[Holds, Holds]] = []  # per call of show: what hide is to return, and what they held
        self._alone = False  # nobody else can write now
        self._same = False  # since then the parameters have been made the same as x, rounded

    @property
    def params(self) -> list[Tensor]:
        """All parameters of the optimizer, in its order."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    @property
    def in_module_order(self) -> list[Tensor]:
        """All parameters of the optimizer, in the order of their names where they have some."""
        place = {p: i for i, p in enumerate(self._names)}
        return sorted(self.params, key=lambda p: place.get(p, len(place)))

    def __iter__(self) -> Iterator[Weight]:
        return iter(self._weights.values())

    def __contains__(self, p: Tensor) -> bool:
        return p in self._weights

    def __getitem__(self, p: Tensor) -> Weight:
        """Return the weight of a tracked parameter."""
        return self._weights[p]

    def track(self, p: Tensor) -> Weight:
        """Return the weight of a parameter, which starts at its value if it is not tracked yet."""
        weight = self._weights.get(p)
        if weight is None:
            wide = torch.promote_types(p.dtype, torch.float32)
            start = shards.local(p).detach()
            if self.offloads:
                weight = Weight(p, shards.to_host(start, dtype=wide))
            else:
                weight = Weight(p, start.to(wide, copy=True, memory_format=torch.preserve_format))
            self._weights[p] = weight
        return weight

    @contextmanager
    def fetched(self, weights: Sequence[Weight], *, to_read: bool = False) -> Iterator[None]:
        """Have the anchors of some weights where the parameters are, and then put them away again; calls nest.

        Nothing waits for the copies. Without offloading, the anchors are where they are.

        Args:
            weights: whose.
            to_read: they will not change.

        Yields:
            Nothing.
        """
        away = [w for w in weights if w.home is None] if self.offloads else []
        try:
            for w in away:
                near = torch.empty_like(w.anchor, device=w.value.device)
                w.home, w.anchor, w.whole = w.anchor, near.copy_(w.anchor, non_blocking=True), None
            yield
        finally:
            for w in away:
                if w.home is not None:
                    if not to_read:
                        w.home.copy_(w.anchor, non_blocking=True)
                    w.anchor, w.home, w.whole = w.home, None, None

    # Which weights a parameter holds

    @property
    def shown(self) -> bool:
        """Whether someone looks, and training waits."""
        return bool(self._before)

    @property
    def at_rest(self) -> bool:
        """Whether no loop has begun: y is x, and the parameters are both."""
        return self.holds is Holds.ANCHOR and not self._before

    def anchor_of(self, p: Tensor) -> Tensor | None:
        """Return x of a parameter that holds another value in training; None where it holds x, or what is shown."""
        if self.shown or p not in self._weights or self.holds not in (Holds.INNER, Holds.OTHER):
            return None
        return shards.whole(self._weights[p].near_anchor, p)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Write alone, as in a hook of the optimizer: what the loop makes the same stays so, and is not compared.

        Yields:
            Nothing.
        """
        outermost, self._alone = not self._alone, True
        try:
            yield
        finally:
            if outermost:
                self._alone = self._same = False

    @torch.no_grad()
    def settle(self) -> None:
        """Bring x up to date with the parameters, which may have been written since they hold it."""
        if self._before:
            self.adopt()
        elif self.at_rest:
            if not self._same:
                same = [w for w in self if w.anchor.dtype == w.param.dtype]
                F.copy_([w.anchor for w in same], [w.value for w in same])
                narrow = [w for w in self if w.anchor.dtype != w.param.dtype]
                with self.fetched(narrow):
                    F.copy_where_written_([w.anchor for w in narrow], [w.value for w in narrow])
            having = [(w.average, w.anchor) for w in self if w.average is not None]
            F.copy_([z for z, _ in having], [x for _, x in having])
            self._same = self._alone

    def put_anchors(self, weights: Sequence[Weight]) -> None:
        """Put x into the parameters of some weights, whose loop is over."""
        F.copy_([w.value for w in weights], [w.anchor for w in weights])
        self._same = self._alone and len(weights) == len(self._weights)

    def begin(self) -> None:
        """Begin a loop: from now on y moves and x stays."""
        if self.at_rest and not self.tied:
            self.settle()
            self.holds = Holds.INNER

    def rest(self) -> None:
        """End a loop: the parameters, which hold x, are y too."""
        self.holds = Holds.ANCHOR

    def set_aside(self) -> None:
        """Keep y, so that the parameters can hold another value until :meth:`take_back`."""
        if self.at_rest:
            self.settle()
            for w in self:
                w.kept = w.anchor
        else:
            for w, y in zip(self, F.copies([w.value for w in self]), strict=True):
                w.kept = y
        self.holds = Holds.OTHER

    def take_back(self) -> None:
        """Put y back after :meth:`set_aside`."""
        now = Holds.INNER if self._apart else Holds.ANCHOR
        self._same = self._alone and now is Holds.ANCHOR  # as it was set aside
        kept = [(w.value, w.kept) for w in self if w.kept is not None]
        F.copy_([p for p, _ in kept], [y for _, y in kept])
        for w in self:
            w.kept = None
        self.holds = now

    @property
    def _apart(self) -> bool:
        """Whether a y that is not x is kept beside a parameter."""
        return any(w.kept is not None and w.kept is not w.anchor for w in self)

    def show(self, before: Holds, instead: Mapping[Tensor, Tensor]) -> None:
        """Put x into the parameters, with y beside; calls nest, and inner ones change nothing.

        Args:
            before: what :meth:`hide` is to return, for whoever has to put something else back.
            instead: by parameter, what the outermost call shows in the place of x.
        """
        if self.holds is Holds.DETACHED:
            return
        held = self.holds
        if self._before:
            self._before.append((before, held))
            return
        if held is Holds.INNER:
            # All copies before the first write: there may be no memory for them, and parameters may share theirs.
            for w, y in zip(self, F.copies([w.value for w in self]), strict=True):
                w.kept = y
            F.copy_([w.value for w in self], [w.anchor for w in self])
        else:
            self.settle()
        self._before.append((before, held))
        self.holds = Holds.ANCHOR
        for w in self:
            if w.param in instead:
                w.stand_in = shards.part_of(instead[w.param], w.param)
                w.value.copy_(w.stand_in)
                self.holds = Holds.OTHER
        self._note_versions()

    def adopt(self) -> None:
        """Take as the new x what was written into a parameter since it was shown; y and z restart there."""
        weights = list(self)
        shown = [w.anchor if w.stand_in is None else w.stand_in for w in weights]
        changed = F.differ((w.value, value) for w, value in zip(weights, shown, strict=True))
        # Ranks whose part is as it was follow those whose is not; they meet only where all of them have written.
        touched = [w for w in weights if w.param is not w.value and version(w.param) != w.shown_version]
        if touched:
            flags = dict(zip(weights, changed, strict=True))
            found = shards.anywhere([flags[w] for w in touched], [w.param for w in touched])
            flags |= dict(zip(touched, found, strict=True))
            changed = [flags[w] for w in weights]
        for w, new in zip(weights, changed, strict=True):
            if new:
                w.anchor.copy_(w.value)
                w.average = w.kept = w.stand_in = w.sent = None
                w.moved, w.replaced = False, True
        written = {w for w, new in zip(weights, changed, strict=True) if new}
        self.written += [name for name, w in self.named() if w in written]
        self._note_versions()

    def _note_versions(self) -> None:
        for w in self:
            w.shown_version = version(w.param)

    def hide(self) -> Holds | None:
        """Leave :meth:`show`; the outermost call puts y back, but where a new x was written.

        Returns:
            What the outermost :meth:`show` was given as ``before``; None for an inner call.
        """
        if not self._before:
            return None
        before, held = self._before.pop()
        if self._before:
            return None
        self.adopt()
        for w in self:
            if w.kept is not None or w.stand_in is not None:
                w.value.copy_(w.anchor if w.kept is None else w.kept)
            w.kept = w.stand_in = None
        self.holds = held
        return before

    def detach(self) -> None:
        """Leave x in the parameters, or what is shown, for good; y, for which there may be no memory, is forgotten."""
        if self.at_rest:
            self.settle()
        if self.holds is Holds.INNER and not self._before:
            for w in self:
                w.value.copy_(w.anchor)
        for w in self:
            w.kept = w.stand_in = None
        self._before = []
        self.holds = Holds.DETACHED

    # The optimizer's step

    def stepping(self) -> tuple[list[Weight], list[Any]]:
        """Return the weights of the parameters that have a gradient now, and their learning rates."""
        weights, rates = [], []
        for group in self._optimizer.param_groups:
            lr = group.get("lr", 0.0)
            lr = float(lr) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else lr
            for p in group["params"]:
                if p.grad is not None:
                    weights.append(self.track(p))
                    rates.append(lr)
        return weights, rates

    # State

    def by_name(self) -> dict[str, Tensor]:
        """Return every parameter of the optimizer by its key in the state."""
        return {self._names.get(p, str(i)): p for i, p in enumerate(self.params)}

    def named(self) -> Iterator[tuple[str, Weight]]:
        """Yield every weight with its key in the state."""
        for name, p in self.by_name().items():
            if p in self._weights:
                yield name, self._weights[p]

    def state_dict(self, *, anchor: bool) -> dict[str, dict[str, Any]]:
        """Return what is needed to go on, by name; tensors are references.

        Args:
            anchor: with x; without it, x is saved only where the parameter has less precision.
        """
        self.settle()
        arrive(self)
        entries: dict[str, dict[str, Any]] = {}
        for name, w in self.named():
            entry: dict[str, Any] = {}
            if anchor or w.anchor.dtype != w.param.dtype:
                entry["anchor"] = shards.whole(w.anchor, w.param)
            if self.tied:
                entry |= {} if w.gradient is None else {"gradient": shards.whole(w.gradient, w.param)}
            elif self._begun:
                entry |= {"moved": w.moved, "inner": shards.whole(w.inner, w.param)}
                entry |= {} if w.average is None else {"average": shards.whole(w.average, w.param)}
                entry |= {} if w.gradient is None else {"gradient": shards.whole(w.gradient, w.param)}
                entry |= {} if w.sent is None else {"sent": shards.whole(w.sent, w.param), "fragment": w.fragment}
            entries[name] = entry
        return entries

    @property
    def _begun(self) -> bool:
        """Whether y is, or may be, another than x when training goes on."""
        held = self._before[0][1] if self._before else self.holds
        return held in (Holds.INNER, Holds.DETACHED) or self._apart

    def load_state_dict(self, entries: Mapping[str, Mapping[str, Any]], *, before: Holds | None = None) -> None:
        """Track the parameters again from saved entries: x from ``anchor``, or else from the parameter.

        The parameters hold y afterwards, or x with y beside where they are shown.

        Args:
            entries: by name, from :meth:`state_dict`; checked.
            before: what :meth:`hide` is to return where they are shown; None: what they hold then.
        """
        by_name = self.by_name()
        if self._before:  # what is not in the state is x, and not what stands in for it
            self.adopt()
            for w in self:
                if w.stand_in is not None:
                    w.value.copy_(w.anchor)
            self.holds = Holds.ANCHOR
        self._weights = {}
        apart = False
        for name, entry in entries.items():
            p = by_name[name]
            parts = {k: shards.part_of(t, p) for k, t in entry.items() if isinstance(t, Tensor)}
            if "anchor" in parts:
                shards.local(p).copy_(parts["anchor"])
            w = self.track(p)
            if "anchor" in parts:
                w.anchor.copy_(parts["anchor"])
            w.moved = entry.get("moved", False)
            w.fragment = entry.get("fragment", 0)
            for key in ("average", "gradient", "sent"):
                if key in parts:
                    setattr(w, key, torch.empty_like(w.anchor, device=w.value.device).copy_(parts[key]))
            if "inner" in parts:
                apart = True
                if self._before:
                    w.kept = torch.empty_like(w.value).copy_(parts["inner"])
                else:
                    w.value.copy_(parts["inner"])
        now = Holds.INNER if apart else Holds.ANCHOR
        if self._before:
            self._before[0] = (before or now, now)
            self._note_versions()
        else:
            self.holds = now
