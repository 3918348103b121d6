"""The outer step: what replicas agree on, and an optimizer over the anchors, fed with the pseudo-gradient."""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine import shards
from lightning_entropy.engine.offload import OffloadedMoments
from lightning_entropy.engine.weight import Weight, arrive, means_of
from lightning_entropy.engine.weights import Weights
from lightning_entropy.methods.relaxation import Relaxation, Settings
from lightning_entropy.methods.targets import OuterTarget

OuterFactory = Callable[[list[Tensor]], Optimizer]

# Starts the mean over replicas; a callable result waits for it, a list is the mean itself. None: it could not be had,
# and the outer step does without a pull, or is put off where it needs the mean.
Mean = list[Tensor] | None
ReplicaMean = Callable[[list[Tensor]], Mean | Callable[[], Mean]]

# One for all fragments of the weights, or one for each.
ReplicaMeans = ReplicaMean | Sequence[ReplicaMean]


class OuterRule:
    """What ends a loop: x <- outer(x, x - z + rho (x - mean over replicas of x)), and y restarts at x.

    Where y goes on from where it is (two time scales), x follows only when the next step begins or someone looks: at a
    y that has seen the constraints that are put back after a step. An x that y restarts at is in the parameters for
    them to see.

    Args:
        relaxation: the method.
        weights: of the loop.
        factory: makes the outer optimizer; None: Nesterov SGD with the relaxation's numbers.
        replica_mean: mean over replicas; None: there is one.

    Raises:
        TypeError: as :class:`OuterStep`.
    """

    def __init__(
        self, relaxation: Relaxation, weights: Weights, factory: OuterFactory | None, replica_mean: ReplicaMeans | None
    ) -> None:
        self._reset, self._pulls = relaxation.reset, relaxation.rho != 0
        self._weights = weights
        self._step = OuterStep(factory, relaxation.outer_momentum, offloads=weights.offloads)
        mean = replica_mean[0] if isinstance(replica_mean, Sequence) else replica_mean
        self._replicas = Replicas(mean, relaxation.outer_target)
        self._due: tuple[list[Weight], Settings] | None = None  # a step that is counted, and not taken yet

    def begin(self) -> None:
        """With replicas, begin a loop for all trainable parameters and start the mean that can travel early."""
        if not self._replicas:
            return
        for p in self._weights.params:
            if p.requires_grad:
                self._weights.track(p)
        self._weights.begin()
        if self._pulls:
            self._replicas.start(list(self._weights))

    def moving(self) -> list[Weight]:
        """Return the weights that the step concerns, of which there are more with replicas: all take it together."""
        self.begin()
        return [w for w in self._weights if w.moved or self._replicas]

    def end(self, weights: list[Weight], settings: Settings, *, at_once: bool = False) -> None:
        """End a loop.

        Args:
            weights: from :meth:`moving`.
            settings: the relaxation's numbers in it.
            at_once: take the step now, though y goes on from where it is.
        """
        apart = not self._weights.tied
        if weights and apart:
            self._due = weights, settings
        for w in weights:
            w.moved = w.moved and apart
        taken = self.finish() if self._reset or self._replicas or at_once else True
        if self._reset and taken:
            self._weights.rest()

    @torch.no_grad()
    def finish(self) -> bool:
        """Take the step that is due, if one is.

        Returns:
            Whether none is due any more. Where the replicas' common step could not be had it is put off: y and z go on
            from where they are, and the step that ends the next loop is along what they have come since x in both.
        """
        if self._due is None:
            return True
        (weights, settings), self._due = self._due, None
        with self._weights.fetched(weights):
            agreed = self._replicas.agree(weights, settings.rho, reset=self._reset)
            if agreed is None:
                return False
            means, pulls = agreed
            self._step.step(weights, self._weights.named(), means, pulls, settings.outer_lr)
            if self._reset:
                self._weights.put_anchors(weights)
        for w in weights:
            w.moved = False
        return True

    def unfinished(self, outer_step: int, inner_step: int) -> bool:
        """Whether steps have been taken, after t outer and k inner ones, that no outer step has followed."""
        return inner_step > 0

    def progress(self, inner_step: int, settings: Settings) -> None:
        """Do what is due after the k-th inner step of a loop, 0 < k < L: nothing, unless the method streams."""

    def close(self, weights: list[Weight], settings: Settings, outer_step: int, inner_step: int) -> None:
        """Take early the outer step of a loop that ends after k < L steps."""
        self.end(weights, settings, at_once=True)

    @property
    def under_way(self) -> Collection[int]:
        """The fragments whose exchange has begun and has not been used."""
        return ()

    def exchanged(self, fragment: int) -> list[Weight]:
        """Return the weights whose mean over replicas is taken together, in the order in which it is asked for."""
        return list(self._weights)

    def forget_mean(self) -> None:
        """Drop the mean over replicas that is under way, once it has arrived."""
        self._replicas.forget()

    def state_dict(self) -> Mapping[str, Any] | None:
        """Return the outer optimizer's options and, by name, its state; None before its first step."""
        return self._step.state_dict(self._weights.named())

    def common_state(self, fragment: int = 0) -> dict[str, Any]:
        """Return what replicas that take common steps have in common: x and the outer optimizer, by reference.

        Args:
            fragment: of a method that streams, the one whose weights it is of.
        """
        arrive(self._weights)
        named = self._named(fragment)
        outer = self._step.state_dict(named)
        if outer is not None:  # where it waits for the optimizer, it is of all weights
            outer = {**outer, "state": {name: outer["state"].get(name, {}) for name, _ in named}}
        return {"anchors": {name: w.anchor for name, w in named}, "outer": outer}

    def _named(self, fragment: int) -> list[tuple[str, Weight]]:
        """Return the weights of a fragment, with their names."""
        own = set(self.exchanged(fragment))
        return [(name, w) for name, w in self._weights.named() if w in own]

    @torch.no_grad()
    def load_common_state(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`common_state` of another replica; y and z stay, and so do other fragments."""
        arrive(self._weights)
        for name, w in self._weights.named():
            if name in state["anchors"]:
                w.anchor.copy_(state["anchors"][name])
        own, outer = self.state_dict(), state["outer"]
        if own is not None and outer is not None:
            outer = {**outer, "state": {**own["state"], **outer["state"]}}
        self._step.load_state_dict(outer)

    def take_under_way(self, fragment: int, mean: list[Tensor]) -> None:
        """Go on as if a fragment's exchange had begun here: where a method streams, exchanges last longer than a step.

        Args:
            fragment: whose exchange it was, of other replicas.
            mean: that it has brought.
        """

    def check_state(self, what: str, state: Mapping[str, Any] | None) -> None:
        """Refuse a state as :meth:`OuterStep.check_state` does."""
        self._step.check_state(what, state)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from an outer optimizer's state, or without one; a step that was due is not taken."""
        self._due = None
        self._step.load_state_dict(state)
        for w in self._weights:
            w.sent = None  # of a method that streams


def zero_first_moments(optimizer: Optimizer, weights: Iterable[Weight]) -> None:
    """Zero the momentum of SGD and its kin, and the first moment of Adam and its kin, in place."""
    states = [optimizer.state.get(w.param, {}) for w in weights]
    moments = [state.get(key) for key in ("momentum_buffer", "exp_avg") for state in states]
    having = [shards.local(moment) for moment in moments if moment is not None]
    if having:
        torch._foreach_zero_(having)


class OuterStep:
    """x <- outer(x, x - z + rho (x - mean over replicas)), by the user's optimizer, Nesterov SGD, or without one.

    Args:
        factory: makes the optimizer from the list of anchors; None: SGD of this ``momentum``, with the learning rate
            given at every step.
        momentum: Nesterov momentum, in [0, 1).
        offloads: its state is in the host's memory between two steps.

    Raises:
        TypeError: no callable, or one that does not return an optimizer.
    """

    def __init__(self, factory: OuterFactory | None, momentum: float, *, offloads: bool = False) -> None:
        self._options: list[set[str]] | None = None  # of the optimizer's groups; None where there is no optimizer
        if factory is not None:
            if not callable(factory):
                kind = f"a {type(factory).__name__}" if isinstance(factory, Optimizer) else repr(factory)
                hint = "write outer=torch.optim.Adam, or outer=lambda anchors: torch.optim.SGD(anchors, lr=0.5)"
                raise TypeError(f"outer must be a callable of the list of anchors, got {kind}: {hint}")
            made = factory([torch.zeros(1, 1)])  # a matrix, which Muon asks for
            if not isinstance(made, Optimizer) or isinstance(made, LBFGS):
                kind = type(made).__name__
                raise TypeError(f"outer must return a torch.optim.Optimizer that steps without a closure, got {kind}")
            self._options = [set(group) for group in made.param_groups]
        elif momentum:
            self._options = [set(group) for group in SGD([torch.zeros(1)], lr=1.0).param_groups]
        self._factory = factory
        self._momentum = momentum
        self._loaded: Mapping[str, Any] | None = None  # waits for the optimizer, which waits for the anchors
        self.optimizer: Optimizer | None = None
        self._away = OffloadedMoments() if offloads else None

    def step(
        self,
        weights: Sequence[Weight],
        names: Iterable[tuple[str, Weight]],
        means: Sequence[Tensor],
        pulls: Sequence[Tensor | None],
        lr: float,
    ) -> None:
        """Take one step on the anchors.

        Args:
            weights: whose anchors move.
            names: every weight with its key in the state.
            means: z, one per weight.
            pulls: rho (x - mean over replicas of x), one per weight; None: no pull.
            lr: step size where the optimizer is not the user's.
        """
        anchors = [w.anchor for w in weights]
        having = [w for w, pull in zip(weights, pulls, strict=True) if pull is not None]
        forces = [pull for pull in pulls if pull is not None]
        if self._factory is None and self._momentum == 0:
            # x - (x - z) would not be z to the last bit, nor where z is infinite.
            F.copy_(anchors, means) if lr == 1 else torch._foreach_lerp_(anchors, list(means), lr)
            if having:
                torch._foreach_add_([w.anchor for w in having], forces, alpha=-lr)
            return
        gradients = list(torch._foreach_sub(anchors, list(means)))
        if having:
            by_weight = dict(zip(weights, gradients, strict=True))
            torch._foreach_add_([by_weight[w] for w in having], forces)
        xs = {w: self._of(w) for w in weights}
        optimizer = self._made(xs, names)
        if self._factory is None:
            for group in optimizer.param_groups:
                group["lr"] = lr
        for (w, x), gradient in zip(xs.items(), gradients, strict=True):
            x.grad = gradient if x is w.anchor else shards.whole(gradient, w.param)
        optimizer.step()
        for x in xs.values():
            x.grad = None
        if self._away is not None:
            self._away.put_away(optimizer, xs)

    def _of(self, w: Weight) -> Tensor:
        """Return x as the optimizer has it: the whole of it, of which norms and products of matrices are taken.

        The optimizer that is ours goes weight by weight, and gets the parts.
        """
        return w.anchor if self._factory is None else w.whole_anchor

    def _made(self, xs: Mapping[Weight, Tensor], names: Iterable[tuple[str, Weight]]) -> Optimizer:
        """Return the optimizer, made at the first step, with anchors that came later added."""
        anchors = list(xs.values())
        if self.optimizer is None:
            if self._factory is None:
                self.optimizer = SGD(anchors, lr=1.0, momentum=self._momentum, nesterov=True, foreach=True)
            else:
                self.optimizer = self._factory(anchors)
        if self._loaded is not None:
            for group, options in zip(self.optimizer.param_groups, self._loaded["options"], strict=True):
                group.update(options)
            for name, w in names:
                if name in self._loaded["state"]:
                    self._load(self.optimizer, w, self._loaded["state"][name])
            self._loaded = None
        if self._away is not None:
            self._away.fetch(self.optimizer, xs)
        known = {x for group in self.optimizer.param_groups for x in group["params"]}
        self.optimizer.param_groups[0]["params"].extend(x for x in anchors if x not in known)
        return self.optimizer

    def _load(self, optimizer: Optimizer, w: Weight, state: Mapping[str, Any]) -> None:
        if self._away is not None:
            self._away.load(optimizer, w, state)
            return
        x = self._of(w)
        for key, value in state.items():
            # A moment has the weight's shape and place; a step counter stays where the optimizer had it.
            if isinstance(value, Tensor) and value.shape == w.param.shape:
                # A part is copied out of the whole, which would stay in memory otherwise, and out of deepcopy's reach.
                value = shards.part_of(value, w.param).to(w.anchor.device, copy=w.value is not w.param)
                value = value if x is w.anchor else shards.whole(value, w.param)
            optimizer.state[x][key] = value

    def state_dict(self, names: Iterable[tuple[str, Weight]]) -> Mapping[str, Any] | None:
        """Return the optimizer's options and, by name, its state; None before the first step."""
        if self.optimizer is None:
            return self._loaded
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {"options": options, "state": {name: self._state_of(w) for name, w in names}}

    def _state_of(self, w: Weight) -> dict[str, Any]:
        assert self.optimizer is not None
        x = self._of(w) if self._away is None else self._away.get(w)
        state = {} if x is None else dict(self.optimizer.state.get(x, {}))
        parts = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == w.anchor.shape}
        if self._away is not None or x is w.anchor:
            state |= {k: shards.whole(v, w.param) for k, v in parts.items()}
        return state

    def check_state(self, what: str, state: Mapping[str, Any] | None) -> None:
        """Refuse the state of another optimizer than this one; what there is no optimizer for is left alone.

        Args:
            what: the state is in, for the message.
            state: of :meth:`state_dict`.

        Raises:
            ValueError: another number of groups, or groups with other options.
        """
        if state is None or self._options is None:
            return
        then = [set(group) for group in state["options"]]
        # Another version of torch may have options more, or less; another optimizer has both.
        known = zip(then, (now - {"params"} for now in self._options), strict=False)
        if len(then) != len(self._options) or not all(a <= b or b <= a for a, b in known):
            names = [sorted(now - {"params"}) for now in self._options]
            raise ValueError(
                f"outer in {what} must be of an optimizer with options {names}, got {[sorted(a) for a in then]}: give "
                "the outer optimizer that it was saved with"
            )

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Keep a copy of the state until the anchors are there."""
        self.optimizer, self._loaded = None, copy.deepcopy(state)
        if self._away is not None:
            self._away = OffloadedMoments()
            self._loaded = shards.mapped(self._loaded, lambda _, t: t if shards.is_sharded([t]) else t.cpu())


class Replicas:
    """The mean over replicas that the outer step needs.

    Args:
        mean: of a list of tensors over replicas; None: there is one replica.
        target: of what, and what for.
    """

    def __init__(self, mean: ReplicaMean | None, target: OuterTarget) -> None:
        self._mean = mean
        self._target = target
        self._under_way: Mean | Callable[[], Mean] = None

    def __bool__(self) -> bool:
        return self._mean is not None

    def start(self, weights: Sequence[Weight]) -> None:
        """Start the mean if it is known when a loop begins, unless it is under way."""
        if self._mean is not None and self._target.early and self._under_way is None:
            arrive(weights)
            self._under_way = self._mean([self._target.of(w.anchor, None) for w in weights])
            for w in weights:
                w.replaced = False

    def forget(self) -> None:
        """Drop the mean under way: of anchors that are no longer what they were."""
        if callable(self._under_way):
            self._under_way()
        self._under_way = None

    def agree(
        self, weights: Sequence[Weight], rho: float, *, reset: bool = False
    ) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """Return what the outer step takes of every weight: z, or the replicas' common one, and the elastic pull.

        None: all replicas take the same step, and the mean along which they do could not be had.
        """
        # z starts at x, where a weight that has not moved in a loop from x still is.
        moved = [w for w in weights if not (reset and w.average is None and not w.moved)]
        known_means = dict(zip(moved, means_of(moved), strict=True))
        means = [known_means.get(w, w.anchor) for w in weights]
        if self._target.common:
            if self._mean is None:
                return means, [None] * len(weights)
            steps = self._mean_of(weights, means)
            if steps is None:
                return None
            return list(torch._foreach_sub([w.anchor for w in weights], steps)), [None] * len(weights)
        targets: Sequence[Tensor | None] = []
        if self._under_way is not None:
            arrived, self._under_way = wait_for(self._under_way), None
            # An x that a user has replaced since is not pulled to the mean of the old ones.
            targets = [None if w.replaced else target for w, target in zip(weights, arrived or [], strict=False)]
        elif not self._target.early and rho:
            targets = means if self._mean is None else self._mean_of(weights, means) or []
        # A parameter that was unfrozen since the mean was started has no target yet.
        pairs = list(zip_longest(weights, targets if rho else []))
        known = [(w.anchor, target) for w, target in pairs if target is not None]
        if not known:
            return means, [None] * len(weights)
        near = [target.to(x.device, non_blocking=True) for x, target in known]  # of an offloaded x, it is not
        pulls = torch._foreach_sub([x for x, _ in known], near)
        torch._foreach_mul_(pulls, rho)
        waiting = iter(pulls)
        return means, [None if target is None else next(waiting) for _, target in pairs]

    def _mean_of(self, weights: Sequence[Weight], means: Sequence[Tensor]) -> Mean:
        assert self._mean is not None
        return wait_for(self._mean([self._target.of(w.anchor, z) for w, z in zip(weights, means, strict=True)]))


def wait_for(mean: Mean | Callable[[], Mean]) -> Mean:
    """Return a mean that has been started."""
    return mean() if callable(mean) else mean
