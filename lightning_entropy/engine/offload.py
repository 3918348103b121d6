"""x and the outer optimizer's state in the host's memory, for methods that need them at outer steps alone.

The host's memory is pinned where CUDA is: copies from and to it are then queued behind the device's work and nothing
waits for them. Whoever reads them on the host calls :func:`arrive` before. On a CPU all of it is done just the same.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_entropy.engine import shards
from lightning_entropy.engine.weight import Weight
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.methods.validation import check_bool


def check_offload(offload_anchor: bool, relaxation: Relaxation) -> bool:
    """Return ``offload_anchor`` if it is False, or if nothing needs x between the outer steps of a method.

    Raises:
        TypeError: no bool.
        ValueError: True, and something does.
    """
    if not check_bool("offload_anchor", offload_anchor):
        return False
    if not relaxation.has_anchor:
        raise ValueError("offload_anchor must be False with perturb=True, got True: the weights are x, and no other is")
    for name, value, why in (("gamma", 0, "a spring"), ("average", 1, "a running mean")):
        found = getattr(relaxation, name)
        if found != value:
            raise ValueError(
                f"{name} must be {value} with offload_anchor=True, where nothing may be needed between outer steps "
                f"beside the weights, as {why} is, got {found!r}"
            )
    return True


def warn_if_useless(params: Iterable[Tensor]) -> None:
    """Warn where parameters are in the host's memory themselves."""
    if any(shards.local(p).device.type == "cpu" for p in params):
        warnings.warn(
            "offload_anchor=True gains nothing for parameters on cpu: x is in the same memory in either case",
            stacklevel=2,
        )


class OffloadedMoments:
    """The state of an outer optimizer, weight by weight away from the device between its steps.

    A weight whose x is away has an empty tensor in its place in the optimizer, which steps over it: it has no gradient.
    """

    def __init__(self) -> None:
        self._places: dict[Weight, Tensor] = {}
        self._moments: dict[Weight, list[str]] = {}  # what is away of the state in its place

    def get(self, w: Weight) -> Tensor | None:
        """Return what the optimizer has in the place of a weight's x; None where it has x."""
        return self._places.get(w)

    def load(self, optimizer: Optimizer, w: Weight, state: Mapping[str, Any]) -> None:
        """Take the state of a weight, as it was saved, for the step in which it is fetched."""
        place = self._places.setdefault(w, torch.empty(0))
        self._moments[w] = [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == w.param.shape]
        parts = {k: shards.part_of(state[k], w.param).detach() for k in self._moments[w]}
        optimizer.state[place] = {**state, **{k: shards.to_host(part) for k, part in parts.items()}}

    def fetch(self, optimizer: Optimizer, anchors: Mapping[Weight, Tensor]) -> None:
        """Put back the moments of some weights, and x into its place.

        Args:
            optimizer: to be stepped.
            anchors: x as the optimizer is to have it.
        """
        _exchange(optimizer, {self._places.pop(w): x for w, x in anchors.items() if w in self._places})
        for w, x in anchors.items():
            for key in self._moments.pop(w, ()):
                part = torch.empty_like(optimizer.state[x][key], device=w.anchor.device)
                part.copy_(optimizer.state[x][key], non_blocking=True)
                optimizer.state[x][key] = shards.whole(part, w.param) if isinstance(x, DTensor) else part

    def put_away(self, optimizer: Optimizer, anchors: Mapping[Weight, Tensor]) -> None:
        """Undo :meth:`fetch` after a step. What has not the shape of a weight, such as a count of steps, stays."""
        for w, x in anchors.items():
            state = optimizer.state.get(x, {})
            self._moments[w] = [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == x.shape]
            for key in self._moments[w]:
                state[key] = shards.to_host(shards.local(state[key]))
            self._places[w] = torch.empty(0)
        _exchange(optimizer, {x: self._places[w] for w, x in anchors.items()})


def _exchange(optimizer: Optimizer, new: Mapping[Tensor, Tensor]) -> None:
    """Put other tensors in the places of an optimizer's parameters; their states go with them."""
    for group in optimizer.param_groups:
        group["params"] = [new.get(p, p) for p in group["params"]]
    for old, p in new.items():
        if old in optimizer.state:
            optimizer.state[p] = optimizer.state.pop(old)
