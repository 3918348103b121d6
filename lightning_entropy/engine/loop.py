r"""The engine: one loop for every method, attached to the user's own optimizer.

A :class:`Relaxation` says what the loop does; the methods of the family differ in its numbers alone. Here the loop is
unrolled: ``optimizer.step()`` is one inner step, and a counter says when the outer step is due. So the optimizer
stays the user's: its class, its state, its checkpoint keys, its schedulers.

The loop counts, and calls the inner rules and the outer one; which weights a parameter holds is :class:`Weights`'s.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine.constraints import Constraints
from lightning_entropy.engine.formats import check_loop, without_measured_gamma
from lightning_entropy.engine.inner_rules import inner_rules
from lightning_entropy.engine.native.step import NativeStep
from lightning_entropy.engine.noise import NoiseStreams
from lightning_entropy.engine.offload import check_offload, warn_if_useless
from lightning_entropy.engine.optimizer_hooks import OptimizerHooks
from lightning_entropy.engine.outer_rules import OuterFactory, OuterRule, ReplicaMeans, zero_first_moments
from lightning_entropy.engine.shards import Gathered, is_sharded, local, whole
from lightning_entropy.engine.step import Step
from lightning_entropy.engine.streaming import StreamingRule
from lightning_entropy.engine.weight import Weight, arrive
from lightning_entropy.engine.weights import Holds, Weights
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.methods.validation import check_bool, check_integer

FORMAT = 2  # of InnerOuter.state_dict(); 1 had what gamma="auto" measured


class InnerOuter:
    """The loop of one optimizer, made by :func:`lightning_entropy.relax`.

    Attributes:
        optimizer: the user's.
        relaxation: the method.
        settings: its numbers at step t.
        weights: x, y and z of every parameter.
        inner_step: k, inner steps since the last outer step, in [0, L).
        outer_step: t, outer steps done.
        perturbs: whether gradients are taken at other weights than y.
        due: whether a step was taken since the parameters were last perturbed, and they are to be perturbed again.
        measure: whether outer steps take :attr:`distances` (two passes over the weights, no device is waited for).
        distances: rms per weight of y - x and z - x, as scalars, at the last outer step with ``measure``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        relaxation: Relaxation,
        *,
        outer: OuterFactory | None = None,
        replica_mean: ReplicaMeans | None = None,
        seed: int | None = None,
        compile: bool = False,
        offload_anchor: bool = False,
        names: Mapping[Tensor, str] | None = None,
        count_attempts: bool = False,
        prepare_after_step: bool = True,
        self_writing: Collection[Tensor] = (),
        watch_writes: bool = False,
        bystander: Callable[[], bool] = lambda: False,
        module: Module | None = None,
    ) -> None:
        """Attach to the optimizer.

        Args:
            optimizer: the user's. This and the next six are documented at :func:`lightning_entropy.relax`.
            relaxation: the method.
            outer: makes the outer optimizer.
            replica_mean: mean over replicas; a sequence has one for each fragment.
            seed: of the noise.
            compile: one compiled pass over memory per inner step.
            offload_anchor: x and the outer optimizer's state in the host's memory between outer steps.
            names: keys of the parameters in :meth:`state_dict`; without one, a parameter's key is its position.
            count_attempts: leave the counter to the caller, who calls :meth:`advance` after every attempted step, so
                that replicas stay in step when a gradient scaler skips an update on one of them.
            prepare_after_step: perturb the parameters anew at the end of every step, where the method does so; False:
                whoever drives the loop calls :meth:`prepare` before the next forward pass, where :attr:`due` says so.
            self_writing: parameters that their module's forward pass writes into (an embedding with ``max_norm``).
            watch_writes: note which weights are written after a step, for :meth:`close`.
            bystander: asked at every step whether it passes the loop by: somebody tries the plain optimizer, and will
                put back what it did.
            module: see :func:`lightning_entropy.relax`.

        Raises:
            TypeError: a seed that is no int, a ``compile`` or ``offload_anchor`` that is no bool, an outer optimizer
                that is none, or an optimizer without step hooks.
            ValueError: the optimizer has a loop already, a negative seed, no ``module`` for sharded parameters, or a
                method that needs x at inner steps with ``offload_anchor``.
            RuntimeError: no C++ compiler, or on CUDA no Triton, for ``compile``.
        """
        if module is None and is_sharded(p for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "module must be given where parameters are sharded (DTensor), got None: relax(..., module=model) drops "
                "the copies of whole weights that it has gathered before weights are written"
            )
        self.optimizer = optimizer
        self.relaxation = relaxation
        self.settings = relaxation.at(0)
        offloads = check_offload(offload_anchor, relaxation)
        self.weights = Weights(optimizer, names, tied=not relaxation.has_anchor, offloads=offloads)
        self.inner_step = 0
        self.outer_step = 0
        self.due = False
        self.measure = False
        self.distances: tuple[Tensor, Tensor] | None = None
        self._seed(torch.initial_seed() if seed is None else check_integer("seed", seed, 0))
        rule = StreamingRule if relaxation.streams else OuterRule
        self._outer = rule(relaxation, self.weights, outer, replica_mean)
        native = NativeStep(self.params) if check_bool("compile", compile) else None
        self._inner = inner_rules(relaxation, self.weights, native, self_writing)
        self.perturbs = any(rule.perturbs for rule in self._inner)
        self._constraints = Constraints(self.weights, watched=watch_writes)
        self._gathered = Gathered(module)
        self._count_attempts = count_attempts
        self._prepare_after_step = prepare_after_step
        self._stepping: Step | None = None
        if offloads:
            warn_if_useless(self.params)
        self._hooks = OptimizerHooks(
            optimizer,
            before=self._before_step,
            before_closure=self.prepare,
            on_gradients=self._on_gradients,
            after=self._after_step,
            bystander=bystander,
        )

    # What a user reads and calls

    @property
    def params(self) -> list[Tensor]:
        """All parameters of the optimizer, in its order."""
        return self.weights.params

    @property
    @torch.no_grad()
    def anchor(self) -> list[Tensor]:
        """x, a tensor per parameter in the optimizer's order; the parameter itself where it has not moved yet."""
        self.settle()
        return [whole(self.weights[p].near_anchor, p) if p in self.weights else p.detach() for p in self.params]

    @property
    @torch.no_grad()
    def anchor_parts(self) -> list[Tensor]:
        """:attr:`anchor`, but of sharded parameters this rank's parts."""
        self.settle()
        return [self.weights[p].near_anchor if p in self.weights else local(p).detach() for p in self.params]

    @property
    @torch.no_grad()
    def average(self) -> list[Tensor]:
        """z, a tensor per parameter in the optimizer's order; y where the mean is the last iterate."""
        self.settle()
        return [whole(self.weights[p].mean, p) if p in self.weights else p.detach() for p in self.params]

    def anchor_of(self, p: Tensor) -> Tensor | None:
        """Return x of one parameter that holds another value in training; None where it holds x, or what is shown."""
        self._outer.finish()
        return self.weights.anchor_of(p)

    @property
    def shows_anchor(self) -> bool:
        """Whether the parameters hold x now: inside :meth:`at_anchor`, and where y is x."""
        return self.weights.shown or self.weights.at_rest

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Put x into the parameters by value, and y back at the end.

        Weights that are changed in here (a checkpoint loaded, say) become the new x, and y restarts there.

        Yields:
            Nothing. Stepping the optimizer in here is a ``RuntimeError``.

        Raises:
            RuntimeError: perturbed weights were written, and the change is lost.
        """
        self.show()
        try:
            yield
        finally:
            self.hide()

    @torch.no_grad()
    def show(self, instead: Mapping[Tensor, Tensor] | None = None) -> None:
        """Enter :meth:`at_anchor`; calls nest.

        Args:
            instead: by parameter, what the outermost call shows in the place of x.
        """
        before = self.weights.holds
        self._gathered.drop()
        self._constraints.note()
        self.unperturb()
        self._outer.finish()
        self.weights.show(before, instead or {})

    @torch.no_grad()
    def hide(self) -> None:
        """Leave :meth:`at_anchor`. Weights that were perturbed before are perturbed again, by the same noise."""
        self._gathered.drop()
        if self.weights.hide() is Holds.OTHER:
            self.prepare()

    @torch.no_grad()
    def detach(self) -> None:
        """Leave x in the parameters and no hook behind. May be called twice."""
        self._gathered.drop()
        self.unperturb(check=False)
        self._outer.finish()
        self.weights.detach()
        self._hooks.remove()

    # One inner step

    @torch.no_grad()
    def prepare(self, *, again: bool = False) -> None:
        """Get ready for the next forward pass. Called for every closure; may be called before it, and twice.

        With replicas: allocate state for every trainable parameter, and start their mean now rather than at the
        gradients. With a method that perturbs: perturb the parameters.

        Args:
            again: perturb the parameters that were perturbed the last time, also if some are frozen for a moment.
        """
        if self.weights.shown:
            return
        _refuse_capture("prepare()")
        self._gathered.drop()
        self._outer.finish()
        self.due = False
        self._constraints.forget()
        self._outer.begin()
        if self.perturbs:
            self._read_settings()
            step = self._step([], [], self._forward_noise, first=not again)
            for rule in self._inner:
                rule.before_forward(step)

    begin = prepare  # its name in version 0.1

    @torch.no_grad()
    def unperturb(self, *, check: bool = True) -> None:
        """Take a perturbation out of the parameters until :meth:`prepare`.

        Args:
            check: look for writes.

        Raises:
            RuntimeError: the perturbed weights were written; they hold y nevertheless.
        """
        for rule in self._inner:
            rule.take_back(check=check)

    def _before_step(self) -> None:
        if self.weights.shown:
            raise RuntimeError("optimizer.step() while the parameters show the anchor: leave at_anchor() first")
        _refuse_capture("optimizer.step()")
        self._stepping = None
        self._outer.finish()
        self._read_settings()

    def _read_settings(self) -> None:
        """Read the numbers of step t when its loop begins, before any weight has changed."""
        if not self.inner_step:
            self.settings = self.relaxation.at(self.outer_step)

    def _on_gradients(self, first: bool) -> None:
        with self.weights.alone():
            self._before_update(first)

    def _before_update(self, first: bool) -> None:
        self.unperturb()
        self._outer.begin()
        weights, rates = self.weights.stepping()
        step = self._stepping = self._step(weights, rates, self._noise, first=first)
        if not weights:
            return
        self.weights.begin()
        for rule in self._inner:
            rule.before_update(step)

    def _after_step(self) -> None:
        with self.weights.alone():
            self._after_update()

    def _after_update(self) -> None:
        step, self._stepping = self._stepping, None
        if step is not None and step.weights:
            for rule in self._inner:
                rule.after_update(step)
            for w in step.weights:
                w.moved = True
            if not self._count_attempts:
                self.advance()
        self._constraints.watch()
        self.due = self.perturbs
        if self.due and self._prepare_after_step:
            self.prepare()

    def _step(self, weights: list[Weight], rates: list[Any], noise: NoiseStreams, *, first: bool = True) -> Step:
        number = self.outer_step * self.relaxation.inner_steps + self.inner_step
        return Step(
            optimizer=self.optimizer,
            weights=weights,
            rates=rates,
            settings=self.settings,
            seeds=lambda params: noise.seeds(params, self.params, number),
            inner_steps=self.relaxation.inner_steps,
            number=self.inner_step,
            outer_step=self.outer_step,
            first=first,
            grad_scale=self._hooks.grad_scale,
        )

    @torch.no_grad()
    def close(self) -> None:
        """End an unfinished loop with what it has: the outer step comes early, and momentum is left alone.

        For the end of training, so that its last steps count. A state saved before goes on as if this had not been.
        Weights that somebody has written since their last step (to keep a constraint) are kept as they are.
        """
        if not self.unfinished:
            return
        self._gathered.drop()
        self.unperturb()
        kept = self._constraints.kept()
        step = self._step(list(self.weights), [], self._noise)
        with self._hooks.ignored():
            for rule in self._inner:
                rule.close(step)
        self._outer_step(closing=True)
        # Whoever keeps a constraint is not called again: x is the y that obeys it.
        for w, y in kept:
            w.anchor.copy_(y)
            w.restart()

    @property
    def unfinished(self) -> bool:
        """Whether :meth:`close` has something to end."""
        return self._outer.unfinished(self.outer_step, self.inner_step)

    @property
    def under_way(self) -> Collection[int]:
        """The fragments whose exchange has begun and has not been used."""
        return self._outer.under_way

    def exchanged(self, fragment: int) -> list[Weight]:
        """Return the weights of a fragment, in the order in which their mean over replicas is asked for."""
        return self._outer.exchanged(fragment)

    def advance(self) -> None:
        """Count one inner step, and take the outer step when L are done."""
        self.inner_step += 1
        streams = self.relaxation.streams  # or else the loop writes at its end alone, with nothing left to close
        if streams:
            self._gathered.drop()
            self._constraints.note()
        if self.inner_step >= self.relaxation.inner_steps:
            self._outer_step()
        else:
            self._outer.progress(self.inner_step, self.settings)
        if streams:
            self._constraints.go_on()

    @torch.no_grad()
    def _outer_step(self, *, closing: bool = False) -> None:
        weights = self._outer.moving()
        if self.measure and weights and not self.weights.tied:
            with self.weights.fetched(weights, to_read=True):
                anchors, params = [w.anchor for w in weights], [w.param for w in weights]
                self.distances = (
                    F.rms_distance([w.inner for w in weights], anchors, params),
                    F.rms_distance([w.mean for w in weights], anchors, params),
                )
        if self.relaxation.reset_momentum and not closing:
            zero_first_moments(self.optimizer, weights)
        done = self.outer_step, self.inner_step
        self.inner_step = 0
        self.outer_step += 1
        if closing:
            self._outer.close(weights, self.settings, *done)
        else:
            self._outer.end(weights, self.settings)

    def settle(self) -> None:
        """Bring x up to date: with an outer step that is not taken yet, and with what was written at rest."""
        self._gathered.drop()
        self._outer.finish()
        self.weights.settle()

    @torch.no_grad()
    def restart(self, values: Iterable[Tensor]) -> None:
        """Set x, y and z to other values and forget every momentum, as a replica that has diverged must.

        Where all replicas take the same outer steps and its x is whole, it keeps the momentum of these.

        Args:
            values: in the order in which tensors were last given to ``replica_mean``.
        """
        self._gathered.drop()
        perturbed = self.weights.holds is Holds.OTHER and not self.weights.shown
        self.unperturb(check=False)
        arrive(self.weights)
        keeps = self.relaxation.outer_target.common and all(w.anchor.isfinite().all() for w in self.weights)
        for w, x in zip(self.weights, values, strict=False):
            w.anchor.copy_(x)
            w.restart()
            self.optimizer.state.pop(w.param, None)
        if not keeps:
            self._outer.load_state_dict(None)
        if perturbed:
            self.prepare()

    def forget_mean(self) -> None:
        """Drop the mean over replicas that is under way, once it has arrived."""
        self._outer.forget_mean()

    def common_state(self, fragment: int = 0) -> dict[str, Any]:
        """Return what replicas that take common steps have in common: x and the outer optimizer, by reference.

        Args:
            fragment: of a method that streams, the one whose weights it is of.
        """
        return self._outer.common_state(fragment)

    def load_common_state(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`common_state` of another replica; y and z stay."""
        self._outer.load_common_state(state)

    def take_under_way(self, fragment: int, mean: list[Tensor]) -> None:
        """Use the mean of a fragment's pseudo-gradients, of other replicas, as if their exchange had begun here."""
        self._outer.take_under_way(fragment, mean)

    # State

    @torch.no_grad()
    def state_dict(self, *, anchor: bool = True) -> dict[str, Any]:
        """Return what a later :meth:`load_state_dict` needs to go on exactly; tensors are references, as in torch.

        Args:
            anchor: with x; without it, whoever loads has put x into the parameters.
        """
        self._outer.finish()
        return {
            "format": FORMAT,
            "inner_step": self.inner_step,
            "outer_step": self.outer_step,
            "seed": self._noise.seed,
            "slots": self.weights.state_dict(anchor=anchor),
            "outer": self._outer.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any], what: str = "state_dict of a loop") -> None:
        """Check what :meth:`load_state_dict` is to be given; nothing changes.

        Args:
            state: to be loaded.
            what: it is, for the message.

        Raises:
            ValueError: as :meth:`load_state_dict`.
        """
        shapes = {name: None if is_lazy(p) else p.shape for name, p in self.weights.by_name().items()}
        check_loop(what, state, FORMAT, shapes)
        self._outer.check_state(what, state["outer"])

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called; the parameters get y.

        Args:
            state: of a loop over the same parameters.

        Raises:
            ValueError: a parameter that this optimizer does not have, another shape, a newer format, a key that is
                missing or of the wrong type, or the state of another outer optimizer; nothing has changed.
        """
        self.check_state(state)
        state = without_measured_gamma(state)
        settings = self.settings
        if state["inner_step"]:  # or else they are read when the loop begins, if it does: a schedule may have ended
            settings = self.relaxation.at(state["outer_step"])
        self._gathered.drop()
        self.unperturb(check=False)
        self.weights.load_state_dict(state["slots"], before=Holds.OTHER if self.perturbs else None)
        self._outer.load_state_dict(state["outer"])
        self.inner_step, self.outer_step = state["inner_step"], state["outer_step"]
        self._seed(state["seed"])
        self._outer.forget_mean()
        self.settings = settings
        if self.perturbs:
            self.prepare()

    def _seed(self, seed: int) -> None:
        """Set the seed of the chain's noise and of the perturbation's, which differ where a step draws both."""
        self._noise = NoiseStreams(seed)
        self._forward_noise = self._noise if self.weights.tied else NoiseStreams(seed, "perturbation")


def _refuse_capture(what: str) -> None:
    """Refuse to be recorded into a CUDA graph: the host counts steps and picks their noise, and a replay has no host.

    Raises:
        RuntimeError: the current stream is capturing.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} must not be captured in a CUDA graph while a loop is attached, as a replay would count no step "
            "and draw the same noise: capture the forward and the backward pass (torch.cuda.make_graphed_callables), "
            "and call it outside; or detach() the loop"
        )
