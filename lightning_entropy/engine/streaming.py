r"""The outer step of Streaming DiLoCo: part by part of the weights, each some steps after its exchange has begun.

Of a part whose turn it is at step n,

    n - tau:  D <- mean over replicas of x - y, begun here
    n:        x <- outer(x, D);  y <- x + alpha (y - x),

for the paper (arXiv:2501.18512, Algorithm 2), which counts from the start, and torchft, which counts from the use.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine.outer_rules import Mean, OuterFactory, OuterRule, ReplicaMeans, wait_for
from lightning_entropy.engine.weight import Weight, means_of
from lightning_entropy.engine.weights import Weights
from lightning_entropy.methods.relaxation import Relaxation, Settings


class Phase(NamedTuple):
    """When a fragment's turn is, in inner steps of a loop of L: each in [1, L].

    Attributes:
        start: its exchange begins after this step.
        use: its outer step follows this one.
    """

    start: int
    use: int

    def unfinished(self, outer_step: int, inner_step: int, inner_steps: int) -> bool:
        """Whether steps have been taken, after t outer and k inner ones, that no outer step has followed."""
        done = outer_step * inner_steps + inner_step
        first = self.use if self.start <= self.use else self.use + inner_steps
        return done > 0 and (done < first or (inner_step - self.use) % inner_steps != 0)


def phases(inner_steps: int, fragments: int, delay: int) -> list[Phase]:
    """Return the phase of each fragment p = 1, ..., P: used at ceil(L p / P), begun ``delay`` steps before.

    One that would begin before the first step begins L steps later, so that its first loop is the longer one.

    Example:
        >>> phases(6, 2, 1)
        [Phase(start=2, use=3), Phase(start=5, use=6)]
        >>> phases(6, 2, 4)
        [Phase(start=5, use=3), Phase(start=2, use=6)]
    """
    uses = [-(-inner_steps * p // fragments) for p in range(1, fragments + 1)]
    return [Phase((use - delay - 1) % inner_steps + 1, use) for use in uses]


def balanced(sizes: Sequence[int], parts: int) -> list[int]:
    """Return for every size the part that it is in: parts of neighbours, none empty, the largest as small as can be.

    Args:
        sizes: >= 0, at least as many as parts.
        parts: >= 1.

    Example:
        >>> balanced([5, 1, 1, 1, 4], 2), balanced([9, 1, 1], 3)
        ([0, 0, 1, 1, 1], [0, 1, 2])
    """

    def packed(limit: int) -> list[int]:
        found: list[int] = []
        part, filled = 0, 0
        for i, size in enumerate(sizes):
            needed = len(sizes) - i < parts - part  # one for each part that is to come
            if found and (filled + size > limit or needed):
                part, filled = part + 1, 0
            found.append(part)
            filled += size
        return found

    if not sizes:
        return []
    limits = range(max(sizes), sum(sizes) + 1)
    return packed(limits[bisect_left(limits, True, key=lambda limit: packed(limit)[-1] < parts)])


class StreamingRule(OuterRule):
    """An outer step for every fragment in its turn. What replicas send is kept, and sent again after a resume.

    Args:
        relaxation: the method.
        weights: of the loop.
        factory: makes the outer optimizer.
        replica_mean: mean over replicas, of all fragments or one for each; None: there is one replica.

    Raises:
        TypeError: as :class:`OuterStep`.
        ValueError: fewer parameters than fragments.
    """

    def __init__(
        self, relaxation: Relaxation, weights: Weights, factory: OuterFactory | None, replica_mean: ReplicaMeans | None
    ) -> None:
        super().__init__(relaxation, weights, factory, replica_mean)
        n = relaxation.fragments
        if len(weights.params) < n:
            raise ValueError(
                f"fragments must be at most the number of the optimizer's parameters, {len(weights.params)}, got {n}"
            )
        self._means = None
        if replica_mean is not None:
            self._means = list(replica_mean) if isinstance(replica_mean, Sequence) else [replica_mean] * n
        self._inner_steps, self._mixing = relaxation.inner_steps, relaxation.mixing
        self._phases = phases(relaxation.inner_steps, n, relaxation.delay)
        self._under_way: dict[int, tuple[list[Weight], Mean | Callable[[], Mean]]] = {}  # by fragment
        self._given: dict[int, list[Tensor]] = {}  # means of exchanges of others, to be under way when a loop begins
        self._interrupted = False  # what was under way is not any more, and is to be sent again
        self._closed = False  # no step has been taken since close()

    def begin(self) -> None:
        """Begin a loop, and send again what was under way when the state was saved."""
        super().begin()
        given, self._given = self._given, {}
        for fragment, mean in given.items():
            weights = self.exchanged(fragment)
            for w, step in zip(weights, mean, strict=True):
                w.sent, w.fragment, w.moved = step.to(w.anchor), fragment, False
            self._under_way[fragment] = weights, [w.sent for w in weights if w.sent is not None]
        self._resume()

    def unfinished(self, outer_step: int, inner_step: int) -> bool:
        """Whether any fragment has taken steps that no outer step has followed."""
        left = any(phase.unfinished(outer_step, inner_step, self._inner_steps) for phase in self._phases)
        return left and not self._closed

    @torch.no_grad()
    def progress(self, inner_step: int, settings: Settings) -> None:
        """Begin the exchanges of the fragments whose turn it is, and take the outer steps of those whose turn it is."""
        self._closed = False
        self._resume()
        for i, phase in enumerate(self._phases):
            if phase.start == inner_step:
                self._start(i)
        for i, phase in enumerate(self._phases):
            if phase.use == inner_step:
                self._use(i, settings.outer_lr, self._mixing)

    def end(self, weights: list[Weight], settings: Settings, *, at_once: bool = False) -> None:
        """Do what is due after the last step of a loop."""
        self.progress(self._inner_steps, settings)

    @torch.no_grad()
    def close(self, weights: list[Weight], settings: Settings, outer_step: int, inner_step: int) -> None:
        """Take an outer step with all that a fragment has come since its last one; the parameters hold x, as y, then.

        An exchange that is under way, of a part of these steps, is dropped for one of all of them.
        """
        self._closed = True
        self.forget_mean()
        for w in self._weights:
            w.sent, w.moved = None, w.moved or w.sent is not None
        left = [i for i, p in enumerate(self._phases) if p.unfinished(outer_step, inner_step, self._inner_steps)]
        for i in left:
            self._start(i)
        taken = [self._use(i, settings.outer_lr, 0.0) for i in left]
        if all(taken):
            self._weights.put_anchors(list(self._weights))
            self._weights.rest()

    @property
    def under_way(self) -> Collection[int]:
        """The fragments whose exchange has begun and has not been used."""
        return self._under_way.keys()

    def exchanged(self, fragment: int) -> list[Weight]:
        """Return the weights of a fragment, in the order in which their mean over replicas is asked for."""
        # Of what trains now: frozen weights, which are not sent, would leave a fragment without any.
        params = [p for p in self._weights.in_module_order if p.requires_grad or p in self._weights]
        parts = balanced([p.numel() for p in params], len(self._phases))
        own = [p for p, part in zip(params, parts, strict=True) if part == fragment and p in self._weights]
        return [self._weights[p] for p in own]

    def forget_mean(self) -> None:
        """Drop the means under way, once they have arrived; they are asked for again if their steps are kept."""
        for _, mean in self._under_way.values():
            wait_for(mean)
        self._under_way, self._given, self._interrupted = {}, {}, True

    def take_under_way(self, fragment: int, mean: list[Tensor]) -> None:
        """Use the mean of a fragment's pseudo-gradients, of other replicas, as if their exchange had begun here."""
        self._given[fragment] = mean

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from an outer optimizer's state, or without one; what the weights have under way is sent again."""
        self._step.load_state_dict(state)
        self._interrupted, self._closed = True, False

    def _resume(self) -> None:
        if not self._interrupted:
            return
        self._interrupted = False
        sent: dict[int, list[Weight]] = {}
        for w in (self._weights[p] for p in self._weights.in_module_order if p in self._weights):
            if w.sent is not None and w.fragment < len(self._phases):
                sent.setdefault(w.fragment, []).append(w)
        for fragment in sorted(sent.keys() - self._under_way.keys()):
            self._send(fragment, sent[fragment])

    def _start(self, fragment: int) -> None:
        """Measure the fragment's pseudo-gradients and begin their exchange."""
        weights = [w for w in self.exchanged(fragment) if w.moved or self._replicas]
        if not weights:
            return
        if fragment in self._under_way:  # after a resume with other fragments, or another delay
            wait_for(self._under_way.pop(fragment)[1])
        with self._weights.fetched(weights, to_read=True):
            steps = torch._foreach_sub([w.anchor for w in weights], means_of(weights))
        for w, step in zip(weights, steps, strict=True):
            w.sent, w.fragment, w.moved = step, fragment, False
        self._send(fragment, weights)

    def _send(self, fragment: int, weights: list[Weight]) -> None:
        steps = [w.sent for w in weights if w.sent is not None]
        self._under_way[fragment] = weights, steps if self._means is None else self._means[fragment](steps)

    def _use(self, fragment: int, lr: float, mixing: float) -> bool:
        """Take the fragment's outer step along the mean, which is waited for, and let y keep its share.

        Returns:
            Whether there was a mean, if there is to be one.
        """
        if fragment not in self._under_way:  # its first exchange is yet to begin, or it has no weight that trains
            return True
        sent, under_way = self._under_way.pop(fragment)
        steps = wait_for(under_way)
        # No step for an x that a user has replaced since, nor with a later exchange, of another fragment, under way.
        current = [w.sent is not None and w.fragment == fragment for w in sent]
        weights = [w for w, valid in zip(sent, current, strict=True) if valid]
        for w in weights:
            w.sent = None
        if steps is None:  # y goes on, and the next exchange covers the steps of this one too
            return False
        if not weights:
            return True
        common = [step for step, valid in zip(steps, current, strict=True) if valid]
        with self._weights.fetched(weights):
            anchors = [w.anchor for w in weights]
            means: Sequence[Tensor] = torch._foreach_sub(anchors, common)
            self._step.step(weights, self._weights.named(), means, [None] * len(weights), lr)
            if mixing < 1:
                kept = anchors if mixing == 0 else F.copies(anchors)
                if mixing > 0:
                    torch._foreach_lerp_(kept, means_of(weights), mixing)
                F.copy_([w.value for w in weights], kept)
        return True
