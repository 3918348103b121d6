"""The loops of a Trainer's optimizers, and who sees x when: what every driver of the engine shares."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_entropy.engine.loop import InnerOuter, ReplicaMean
from lightning_entropy.engine.outer_rules import OuterFactory
from lightning_entropy.engine.perturbation import PerturbedLoop
from lightning_entropy.engine.relax import make_loop
from lightning_entropy.engine.state_dict_hooks import ModuleHooks
from lightning_entropy.methods.relaxation import Relaxation


class Loops:
    """One loop per optimizer of a LightningModule, shown and hidden together.

    The module shows x whenever anyone looks: by value from :meth:`show` to :meth:`hide`, and in its ``state_dict()``
    (also a submodule's) at any time, through a hook that puts x in the place of y and costs a training step nothing.
    """

    def __init__(
        self,
        module: Module,
        optimizers: Sequence[Optimizer],
        relaxation: Relaxation,
        *,
        outer: OuterFactory | None = None,
        replica_mean: Sequence[ReplicaMean] | None = None,
        seed: int = 0,
        compile: bool = False,
        count_attempts: bool = False,
        several_steps: bool = False,
    ) -> None:
        """Attach; optimizer i draws its noise from (seed, i).

        Args:
            module: whose parameters the optimizers hold.
            optimizers: of the trainer.
            relaxation: the method.
            outer: see :func:`lightning_entropy.relax`, also for ``replica_mean``.
            replica_mean: mean over replicas, one per optimizer: their exchanges run side by side.
            seed: of the noise, the same on all ranks that share gradients, >= 0.
            compile: see :func:`lightning_entropy.relax`.
            count_attempts: see :class:`InnerOuter`.
            several_steps: a batch may step an optimizer more than once, as in manual optimization.

        Raises:
            ValueError: an optimizer has a loop already, or the relaxation cannot work with it.
        """
        names = {p: name for name, p in module.named_parameters()}
        self.shown = False
        self.loops: list[InnerOuter] = []
        try:
            for i, optimizer in enumerate(optimizers):
                loop = make_loop(
                    optimizer,
                    relaxation,
                    outer=outer,
                    replica_mean=None if replica_mean is None else replica_mean[i],
                    seed=seed + (i << 64),
                    compile=compile,
                    names=names,
                    count_attempts=count_attempts,
                )
                self.loops.append(loop)
                if isinstance(loop, PerturbedLoop):
                    loop.resumes = several_steps
                    normed = [m for m in module.modules() if getattr(m, "max_norm", None) is not None]
                    loop.unchecked = {p for m in normed for p in m.parameters(recurse=False)}
        except BaseException:
            for loop in self.loops:
                loop.detach()
            raise
        self._hooks = ModuleHooks(module, self)

    def begin(self) -> None:
        """Put y into the parameters, and start what a loop starts before its first step."""
        self.hide()
        for loop in self.loops:
            loop.begin()

    def rest(self, *, check: bool = True) -> None:
        """End a training batch: perturbed parameters get x back.

        Args:
            check: look for writes.

        Raises:
            RuntimeError: they were written while they were perturbed.
        """
        for loop in self.loops:
            if isinstance(loop, PerturbedLoop) and not self.shown:
                loop.rest(check=check)

    def show(self, instead: Mapping[Tensor, Tensor] | None = None) -> None:
        """Put x into the parameters. May be called twice.

        Args:
            instead: by parameter, other values to show (the consensus of replicas).
        """
        if not self.shown:
            for loop in self.loops:
                loop.show(instead)
        self.shown = True

    def hide(self) -> None:
        """Put y back. May be called twice."""
        if self.shown:
            for loop in self.loops:
                loop.hide()
        self.shown = False

    def detach(self) -> None:
        """Leave x in the parameters, and no hook behind."""
        for loop in self.loops:
            loop.detach()
        self._hooks.remove()

    def holds(self, p: Tensor) -> bool:
        """Tell whether a loop keeps an x of p."""
        return any(loop.holds(p) for loop in self.loops)

    def anchor_of(self, p: Tensor) -> Tensor | None:
        """Give x of one parameter where something else is in it now, else None."""
        return next((x for x in (loop.anchor_of(p) for loop in self.loops) if x is not None), None)

    def state_dict(self) -> list[dict[str, Any]]:
        """Give the state of every loop, without x: that is in the module's."""
        return [loop.state_dict(anchor=False) for loop in self.loops]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the state of every loop; the module holds x.

        Raises:
            ValueError: another number of optimizers, or of other parameters.
        """
        for loop, state in zip(self.loops, states, strict=True):
            loop.load_state_dict(state)

    def metrics(self) -> dict[str, Any]:
        """Give what is logged at outer steps, numbers and scalar tensors; no device is waited for."""
        values: dict[str, Any] = {}
        for i, loop in enumerate(self.loops):
            prefix = "entropy/" if len(self.loops) == 1 else f"entropy/{i}/"
            values[prefix + "gamma"] = loop.settings.gamma
            values[prefix + "rho"] = loop.settings.rho
            values[prefix + "outer_step"] = loop.outer_step
            if loop.distances is not None:
                values[prefix + "inner_distance"], values[prefix + "mean_distance"] = loop.distances
        return values
