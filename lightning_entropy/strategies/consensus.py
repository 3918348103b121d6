"""The consensus: the mean of x over replicas, with floating-point buffers averaged."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_entropy.engine.module_loops import ModuleLoops
from lightning_entropy.engine.shards import whole
from lightning_entropy.strategies.exchange import Coupling


class Consensus:
    """Forms the consensus, and puts it into the module and back.

    Args:
        module: whose parameters and buffers.
        loops: that hold x.
        mean: over replicas; None: there is one, and x is the consensus.
        streams: the loops' own exchanges.
        early: they are of x.
        every: parameters that no optimizer has are averaged too; False: they are the same on all replicas.
        replica: this one's number, for messages.
    """

    def __init__(
        self,
        module: Module,
        loops: ModuleLoops,
        mean: Coupling | None,
        streams: Sequence[Any],
        *,
        early: bool,
        every: bool,
        replica: int,
    ) -> None:
        self._module, self._loops, self._mean, self._every = module, loops, mean, every
        self._streams, self._early, self._replica = streams, early, replica
        self._good_buffers = [b.detach().clone() for b in self.buffers()]

    @torch.no_grad()
    def show(self, *, alone: bool) -> None:
        """Put the consensus into the module. A collective; calls nest, and inner ones change nothing.

        Args:
            alone: no collective: the mean that is on its way, if it has arrived, and else this replica's x.
        """
        self._loops.show({} if self._loops.shown else dict(self._means(alone=alone)))

    @torch.no_grad()
    def hide(self) -> None:
        """Put the replica's own values back; what was changed since :meth:`show` stays, as the new x or buffer."""
        self._loops.hide()

    def fill(self, state: dict[str, Any], *, alone: bool) -> dict[str, Any]:
        """Put the consensus in the place of x in a state dict of the module. A collective, where it is not shown.

        Args:
            state: of the module.
            alone: as in :meth:`show`.

        Returns:
            The same dict.
        """
        if self._loops.shown:
            return state
        means = dict(self._means(alone=alone))
        named = [
            *self._module.named_parameters(remove_duplicate=False),
            *self._module.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in named:
            if tensor in means and name in state:
                state[name] = means[tensor].to(tensor.dtype)
        return state

    def own(self) -> dict[str, Tensor]:
        """Return this replica's own buffers and those parameters that no loop tracks, by name."""
        tensors = dict(self._module.named_buffers())
        if self._every:
            tensors |= {n: p for n, p in self._module.named_parameters() if not self._loops.tracks(p)}
        return dict(zip(tensors, self._loops.substitutes.own(list(tensors.values())), strict=True))

    @torch.no_grad()
    def load_own(self, values: dict[str, Tensor]) -> None:
        """Go on from :meth:`own`."""
        tensors = dict(self._module.named_buffers()) | dict(self._module.named_parameters())
        for name, value in values.items():
            if name in tensors:
                tensors[name].copy_(value)
        self._good_buffers = [b.detach().clone() for b in self.buffers()]

    @torch.no_grad()
    def mend_buffers(self) -> None:
        """Set buffers with nan or inf to the value of the last consensus, or of the start of training."""
        for buffer, good in zip(self.buffers(), self._good_buffers, strict=True):
            if not buffer.isfinite().all() and good.isfinite().all():
                buffer.copy_(good)

    def buffers(self) -> list[Tensor]:
        """Return the buffers that are averaged: those of floating-point numbers."""
        return [b for b in self._module.buffers() if b.is_floating_point()]

    @torch.no_grad()
    def _means(self, *, alone: bool) -> list[tuple[Tensor, Tensor]]:
        """Pair every averaged tensor of the module with its mean."""
        if self._mean is None:
            return []
        if alone:
            return self.known() if self._early else []
        for coupling in self._streams:
            if coupling.round is not None:
                coupling.round.advance()  # others may be waiting for it, and would not come here before it arrives
        params = [p for loop in self._loops.loops for p in loop.params]
        values = [x for loop in self._loops.loops for x in loop.anchor_parts]
        if self._every:
            rest = [p for p in self._module.parameters() if p not in set(params)]
            params, values = [*params, *rest], [*values, *(p.detach() for p in rest)]
        buffers = self.buffers()
        given = [*values, *(b.detach() for b in buffers)]
        means = self._mean(given, judged=len(values))()
        self._mean.round = None  # holds a copy of the weights
        n = len(values)
        good = [
            m.to(b.dtype) if m.isfinite().all() else (old if old.isfinite().all() else b.detach().clone())
            for m, b, old in zip(means[n:], buffers, self._good_buffers, strict=True)
        ]
        self._good_buffers = good
        self._mend(dict(zip(params, means, strict=False)))
        shown = [whole(m, p) for m, p in zip(means, params, strict=False)]
        return list(zip([*params, *buffers], [*shown, *good], strict=True))

    def _mend(self, means: Mapping[Tensor, Tensor]) -> None:
        """Start what is not finite on this replica again: y at its x or else the mean, and buffers at the mean."""
        self.mend_buffers()
        assert self._mean is not None
        loops = self._loops.loops
        lost = [not all(w.inner.isfinite().all() for w in loop.weights) for loop in loops]
        gone = [not all(x.isfinite().all() for x in loop.anchor_parts) for loop in loops]
        flags = self._mean.links.any_inside([*lost, *gone])
        for loop, y_is_lost, x_is_lost in zip(loops, flags, flags[len(loops) :], strict=False):
            if y_is_lost or x_is_lost:
                loop.restart([means[w.param] if x_is_lost else w.anchor.clone() for w in loop.weights])
                warnings.warn(
                    f"replica {self._replica} has nan or inf in its weights after outer step {loop.outer_step}: it "
                    f"starts again from {'the consensus' if x_is_lost else 'its anchor'}",
                    stacklevel=2,
                )

    def known(self) -> list[tuple[Tensor, Tensor]]:
        """Return what is known without a collective: the means of x that have arrived since the last outer steps."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for loop, coupling in zip(self._loops.loops, self._streams, strict=False):
            if coupling.round is None or not coupling.round.arrived:
                return []
            try:
                given = list(zip(coupling.round.tensors, coupling.round.wait(), strict=True))
            except RuntimeError:  # it has failed rather than arrived; there is an error on its way already
                return []
            means = {id(x): mean for x, mean in given}
            loop.settle()
            pairs += [
                (w.param, whole(means[id(w.anchor)].to(w.value.device), w.param))
                for w in loop.weights
                if id(w.anchor) in means and not w.replaced
            ]
        return pairs
