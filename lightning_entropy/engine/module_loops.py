"""The loops of a module's optimizers, shown and hidden together: what every driver of the engine shares."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_entropy.engine.forward_hooks import listen
from lightning_entropy.engine.loop import InnerOuter
from lightning_entropy.engine.outer_rules import OuterFactory, ReplicaMeans
from lightning_entropy.engine.relax import make_loop
from lightning_entropy.engine.shards import Gathered
from lightning_entropy.engine.state_dict_hooks import StateDictHooks
from lightning_entropy.engine.substitutes import Substitutes
from lightning_entropy.methods.relaxation import Relaxation


class ModuleLoops:
    """One loop per optimizer of a module.

    The module shows x whenever anyone looks: by value from :meth:`show` to :meth:`hide`, and in its ``state_dict()``
    (also a submodule's) at any time, through a hook that puts x in the place of y and costs a training step nothing.

    Attributes:
        loops: in the order of the optimizers.
        substitutes: what tensors that no loop tracks show in :meth:`show`.
    """

    def __init__(
        self,
        module: Module,
        optimizers: Sequence[Optimizer],
        relaxation: Relaxation,
        *,
        outer: OuterFactory | None = None,
        replica_mean: Sequence[ReplicaMeans] | None = None,
        seed: int = 0,
        compile: bool = False,
        offload_anchor: bool = False,
        count_attempts: bool = False,
        several_steps: bool = False,
        bystander: Callable[[], bool] = lambda: False,
    ) -> None:
        """Attach; optimizer i draws its noise from (seed, i).

        Args:
            module: whose parameters the optimizers hold, each in one of them.
            optimizers: of the trainer.
            relaxation: the method.
            outer: see :func:`lightning_entropy.relax`, also for ``replica_mean``.
            replica_mean: mean over replicas, one per optimizer (and fragment): their exchanges run side by side.
            seed: of the noise, the same on all ranks that share gradients, >= 0.
            compile: see :func:`lightning_entropy.relax`, also for ``offload_anchor``.
            offload_anchor: x in the host's memory.
            count_attempts: see :class:`InnerOuter`.
            several_steps: a batch may have several steps, as in manual optimization: a method that perturbs does so
                anew before the first forward pass of a submodule after each.
            bystander: see :class:`InnerOuter`.

        Raises:
            ValueError: an optimizer has a loop already, or the relaxation cannot work with it.
        """
        self.substitutes = Substitutes()
        self.loops: list[InnerOuter] = []
        self._loading = 0  # state dicts that are being loaded, of modules within modules
        self._module = module
        self._relaxation = relaxation
        self._replica_mean = replica_mean
        self._seed = seed
        self._options: dict[str, Any] = {
            "outer": outer,
            "compile": compile,
            "offload_anchor": offload_anchor,
            "count_attempts": count_attempts,
            "prepare_after_step": False,
            "watch_writes": True,
            "bystander": bystander,
        }
        Gathered(module).drop()  # the parameters that have names are then those that the optimizers have
        try:
            for i, optimizer in enumerate(optimizers):
                self.loops.append(self._attach(i, optimizer))
        except BaseException:
            for loop in self.loops:
                loop.detach()
            raise
        self._hooks = StateDictHooks(module, self)
        perturbs = any(loop.perturbs for loop in self.loops)
        self._forward_hooks = listen(module, self) if several_steps and perturbs else []

    def _attach(self, i: int, optimizer: Optimizer) -> InnerOuter:
        normed = [m for m in self._module.modules() if getattr(m, "max_norm", None) is not None]
        return make_loop(
            optimizer,
            self._relaxation,
            replica_mean=None if self._replica_mean is None else self._replica_mean[i],
            seed=self._seed + (i << 64),
            names={p: name for name, p in self._module.named_parameters()},
            self_writing={p for m in normed for p in m.parameters(recurse=False)},
            module=self._module,
            **self._options,
        )

    def are_of(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether these are the optimizers that the loops are attached to, in their order."""
        return [loop.optimizer for loop in self.loops] == list(optimizers)

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Attach to optimizers that have come and detach from those that are gone, which leave x.

        To be called between batches, after :meth:`resume`. A loop that takes the place of another goes on at its t.

        Args:
            optimizers: that are to be stepped now.

        Raises:
            ValueError: an optimizer has a loop of its own, or the relaxation cannot work with it.
        """
        Gathered(self._module).drop()
        known = {id(loop.optimizer): loop for loop in self.loops}
        before, added = self.loops, {}
        try:
            for i, optimizer in enumerate(optimizers):
                if id(optimizer) not in known:
                    added[id(optimizer)] = loop = self._attach(i, optimizer)
                    if i < len(before):
                        loop.outer_step = before[i].outer_step
        except BaseException:
            for loop in added.values():
                loop.detach()
            raise
        self.loops = [(known | added)[id(optimizer)] for optimizer in optimizers]
        for loop in before:
            if loop not in self.loops:
                loop.detach()

    @property
    def shown(self) -> bool:
        """Whether someone looks at x, and training waits."""
        return self.substitutes.shown

    def prepare(self) -> None:
        """Put y back into the parameters before the next batch, whoever looks, and get ready for its gradients."""
        self.resume()
        for loop in self.loops:
            loop.prepare()

    def resume(self) -> None:
        """Put y back into the parameters, whoever looks."""
        while self.shown:
            self.hide()
        self._loading = 0

    def unperturb(self, *, check: bool = True) -> None:
        """Take perturbations out of the parameters when a batch has ended.

        Args:
            check: look for writes.

        Raises:
            RuntimeError: parameters were written while they were perturbed.
        """
        for loop in self.loops:
            loop.unperturb(check=check)
            loop.due = False

    @torch.no_grad()
    def before_forward(self) -> None:
        """Perturb the parameters of an optimizer that has stepped since they were."""
        for loop in self.loops:
            if loop.due:
                loop.prepare(again=True)

    @torch.no_grad()
    def show(self, instead: Mapping[Tensor, Tensor] | None = None) -> None:
        """Put x into the parameters; calls nest, and inner ones change nothing.

        Args:
            instead: what parameters (in the place of x) and other tensors of the module show, by tensor.

        Raises:
            RuntimeError: parameters were written while they were perturbed.
        """
        instead = instead or {}
        shown: list[InnerOuter] = []
        try:
            for loop in self.loops:
                loop.show(instead)
                shown.append(loop)
            self.substitutes.show({t: value for t, value in instead.items() if not self.tracks(t)})
        except BaseException:
            for loop in shown:
                loop.hide()
            raise

    @torch.no_grad()
    def hide(self) -> list[str]:
        """Leave :meth:`show`; the outermost call puts y back, but where weights were changed: they are the new x.

        Returns:
            The names of parameters that somebody has written since they were shown, other than by loading a state dict.
        """
        self.substitutes.hide()
        for loop in self.loops:
            loop.hide()
        return [] if self.shown else self._take_written()

    def _take_written(self) -> list[str]:
        names = [name for loop in self.loops for name in loop.weights.written]
        for loop in self.loops:
            loop.weights.written = []
        return names

    def begin_loading(self) -> None:
        """Show x while a state dict is loaded; calls nest."""
        self._loading += 1
        self.show()

    @torch.no_grad()
    def end_loading(self) -> None:
        """Leave :meth:`begin_loading`: what the outermost call has loaded is the new x."""
        self._loading = max(self._loading - 1, 0)
        if self._loading == 0:
            for loop in self.loops:
                loop.settle()
            self._take_written()
        self.hide()

    def close(self) -> None:
        """End every unfinished loop with what it has, at the end of training."""
        for loop in self.loops:
            loop.close()

    def detach(self) -> None:
        """Leave x in the parameters, or what is shown, and no hook behind."""
        for loop in self.loops:
            loop.detach()
        self._hooks.remove()
        for handle in self._forward_hooks:
            handle.remove()

    def tracks(self, p: Tensor) -> bool:
        """Whether a loop keeps an x of p."""
        return any(p in loop.weights for loop in self.loops)

    def anchor_of(self, p: Tensor) -> Tensor | None:
        """Return x of one parameter where something else is in it, else None."""
        return next((x for x in (loop.anchor_of(p) for loop in self.loops) if x is not None), None)

    def state_dict(self, *, anchor: bool = False) -> list[dict[str, Any]]:
        """Return the state of every loop; without ``anchor``, x is left to the module's."""
        return [loop.state_dict(anchor=anchor) for loop in self.loops]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the state of every loop; the module holds x.

        Raises:
            ValueError: another number of optimizers, or what :meth:`InnerOuter.load_state_dict` refuses of one; no loop
                has changed.
        """
        if len(states) != len(self.loops):
            raise ValueError(f"the state must be of {len(self.loops)} optimizers, got {len(states)}")
        for i, (loop, state) in enumerate(zip(self.loops, states, strict=True)):
            loop.check_state(state, f"the state of loop {i}")
        for loop, state in zip(self.loops, states, strict=True):
            loop.load_state_dict(state)

    def metrics(self) -> dict[str, Any]:
        """Return what is logged at outer steps, numbers and scalar tensors; no device is waited for."""
        values: dict[str, Any] = {}
        for i, loop in enumerate(self.loops):
            prefix = "entropy/" if len(self.loops) == 1 else f"entropy/{i}/"
            if loop.settings.stiffness:  # the same at every learning rate, which gamma is not
                values[prefix + "stiffness"] = loop.settings.stiffness
            else:
                values[prefix + "gamma"] = loop.settings.gamma
            values[prefix + "rho"] = loop.settings.rho
            values[prefix + "outer_step"] = loop.outer_step
            if loop.distances is not None:
                values[prefix + "inner_distance"], values[prefix + "mean_distance"] = loop.distances
        return values
