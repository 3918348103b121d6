"""Smoothing for a Trainer that works: one callback, any LightningModule, any torch optimizer."""

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import initial_seed

from lightning_entropy.engine.module_loops import ModuleLoops
from lightning_entropy.engine.outer_rules import OuterFactory, OuterStep
from lightning_entropy.methods import presets
from lightning_entropy.methods.presets import ENTROPY_SCOPING
from lightning_entropy.methods.relaxation import Gamma, Number, Relaxation
from lightning_entropy.methods.validation import check_bool, check_integer
from lightning_entropy.trainer.ownership import check_optimizers, check_states, claim, log_outer_step, release


class InnerOuterCallback(Callback):
    """Run a :class:`Relaxation` on every optimizer of the Trainer: one training step is one inner step.

    Works with automatic and manual optimization, accumulation, clipping, every precision, compiled modules, and
    DDP. The weights one keeps are the anchor x: validation, test, ``state_dict()`` and with it every kind of
    checkpoint, and the module after fit or after an exception hold x. Only code that reads the parameters directly
    between two training batches of an epoch may find y (with :class:`HeatSmoothing` it finds x there). What
    ``load_state_dict()`` puts into the module, at any moment, or anyone while x is shown, is the new x. A checkpoint
    loads without the callback, and one made without it loads with it. A second fit without ``ckpt_path`` starts at
    t = 0, as it makes new optimizers.

    Beside it, ``StochasticWeightAveraging`` averages x, since it reads the weights between epochs;
    ``WeightAveraging`` and ``EMAWeightAveraging`` read them after a batch and average y (with :class:`HeatSmoothing`,
    x). The learning-rate and batch-size finders try the plain optimizer.

    At outer steps, but not more often than the Trainer's ``log_every_n_steps``, it logs ``entropy/gamma``,
    ``entropy/rho``, ``entropy/inner_distance`` and ``entropy/mean_distance`` (rms per weight of y - x and z - x
    before the outer step), ``entropy/outer_step`` and ``entropy/effective_epochs`` (passes over the data, every
    gradient counted).

    Args:
        relaxation: the method, such as ``le.lookahead()``.
        outer: makes the outer optimizer from the list of anchors, as in :func:`lightning_entropy.relax`.
        seed: of the noise, >= 0; None: the seed of torch's generator, rank 0's where there are several.
        compile: an inner step in one compiled pass over memory, as in :func:`lightning_entropy.relax`.

    Raises:
        TypeError: ``relaxation`` is not one, or ``outer`` makes no torch optimizer.
        MisconfigurationException: at the start of fit: under FSDP, DeepSpeed or ModelParallel, whose parameters are
            shards; beside another owner of the loop; where a parameter is in two optimizers.
    """

    def __init__(
        self,
        relaxation: Relaxation,
        *,
        outer: OuterFactory | None = None,
        seed: int | None = None,
        compile: bool = False,
    ) -> None:
        if not isinstance(relaxation, Relaxation):
            raise TypeError(f"relaxation must be a Relaxation, got {type(relaxation).__name__}")
        OuterStep(outer, relaxation.outer_momentum)  # refuses now what it would refuse when training starts
        self.relaxation = relaxation
        self.outer = outer
        self.seed = None if seed is None else check_integer("seed", seed, 0)
        self.compile = check_bool("compile", compile)
        self._loops: ModuleLoops | None = None
        self._state: dict[str, Any] = {}  # loaded for the next fit, or left by the last one
        self._logged_at = 0  # global step
        self._outer_steps: list[int] = []  # before this batch
        self._validated_at: list[int] = []  # outer steps at the last validation
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is trained."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise MisconfigurationException(
                f"strategy must keep whole parameters on every rank for {type(self).__name__} (a single device, ddp), "
                f"got {type(trainer.strategy).__name__}"
            )
        claim(trainer, self)
        self._validated_at, self._warned = [], False
        # First in line, so that no other callback's hook looks before x is shown.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(other for other in callbacks if other is not self)]  # type: ignore[attr-defined]
        self._state = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the first moment at which everything is restored and on its device."""
        seed = trainer.strategy.broadcast(initial_seed() if self.seed is None else self.seed)
        check_optimizers(pl_module, trainer.optimizers)
        self._loops = ModuleLoops(
            pl_module,
            trainer.optimizers,
            self.relaxation,
            outer=self.outer,
            seed=seed,
            compile=self.compile,
            prepare_after_step=not pl_module.automatic_optimization,
        )
        self._loops.show()
        if self._state:
            check_states(self._state["loops"], trainer.optimizers)
            self._loops.load_state_dict(self._state["loops"])
            self._state = {}
        self._logged_at = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on with y."""
        if self._loops is None:
            return
        self._loops.prepare()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = bool(trainer.loggers) and 0 < every <= trainer.global_step + 1 - self._logged_at
        for loop in self._loops.loops:
            loop.measure = due
            loop.distances = None
        self._outer_steps = [loop.outer_step for loop in self._loops.loops]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put x back where weights are perturbed, and log, if an outer step was taken and it is time to."""
        if self._loops is None:
            return
        self._loops.unperturb()
        if not any(loop.measure for loop in self._loops.loops):
            return
        if self._outer_steps == [loop.outer_step for loop in self._loops.loops]:
            return
        log_outer_step(trainer, self._loops.metrics())
        self._logged_at = trainer.global_step

    def _show(self) -> None:
        if self._loops is not None:
            self._loops.show()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show x until the next training batch."""
        self._show()
        if self._loops is not None and self.relaxation.has_anchor:
            at = [loop.outer_step for loop in self._loops.loops]
            if at == self._validated_at and not self._warned:
                self._warn_of_watchers(trainer)
            self._validated_at = at

    def _warn_of_watchers(self, trainer: Trainer) -> None:
        """Warn once, where somebody counts validations without improvement, that two are of the same weights."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        watchers = {type(c).__name__ for c in callbacks if isinstance(c, EarlyStopping)}
        watchers |= {"ReduceLROnPlateau" for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
        if watchers:
            self._warned = True
            rank_zero_warn(
                f"two validations had the same weights, as no outer step of {self.relaxation.inner_steps} training "
                f"steps came between, which {' and '.join(sorted(watchers))} may take for no improvement: validate "
                "less often, or raise the patience",
                stacklevel=2,
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show x until the next training batch."""
        self._show()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave x; y stays beside it for the checkpoint that follows."""
        self._show()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave x, whatever was raised and wherever; Lightning calls no teardown after it."""
        self._stop(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take every hook away."""
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        """Leave x in the module and no hook behind; the state stays, for a checkpoint that is saved afterwards."""
        release(trainer, self)
        if self._loops is not None:
            try:
                self._loops.unperturb(check=False)  # an error is on its way, or all is over
                self._loops.show()
                self._state = self.state_dict()
            finally:  # also where y, which show() keeps beside x, finds no memory
                self._loops.detach()
                self._loops = None

    def state_dict(self) -> dict[str, Any]:
        """Give y, z, the counters and the outer optimizer of every loop."""
        return self._state if self._loops is None else {"loops": self._loops.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers are there."""
        self._state = state_dict


class EntropySGD(InnerOuterCallback):
    """Entropy-SGD on an existing Trainer: ``Trainer(callbacks=[EntropySGD()])``.

    Every L training steps the weights jump to the running mean of a noisy descent that a spring holds near them.
    See :func:`lightning_entropy.entropy_sgd` for the equation, the sources and the units, and
    :class:`InnerOuterCallback` for who sees which weights.

    Args:
        inner_steps: L, int >= 1.
        gamma: stiffness, >= 0; ``"auto"`` measures its start; 1/gamma in *Deep Relaxation* and *Parle*.
        noise: thermal noise, >= 0.
        average: weight of the newest y, in (0, 1].
        coupled: the spring inside the optimizer's momentum, as the paper writes it.
        reset_momentum: zero the optimizer's momentum at outer steps, as the released code does.
        outer_lr: step size of the outer step, > 0.
        outer_momentum: Nesterov momentum of the outer step, in [0, 1).
        outer: another outer optimizer (``torch.optim.Adam`` makes Entropy-Adam); replaces both.
        seed: of the noise, >= 0.
        compile: an inner step in one compiled pass over memory.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        inner_steps: int = 20,
        gamma: Gamma = ENTROPY_SCOPING,
        noise: Number = 1e-4,
        average: Number = 0.75,
        *,
        coupled: bool = False,
        reset_momentum: bool = False,
        outer_lr: Number = 1.0,
        outer_momentum: float = 0.0,
        outer: OuterFactory | None = None,
        seed: int | None = None,
        compile: bool = False,
    ) -> None:
        relaxation = presets.entropy_sgd(
            inner_steps,
            gamma,
            noise,
            average,
            coupled=coupled,
            reset_momentum=reset_momentum,
            outer_lr=outer_lr,
            outer_momentum=outer_momentum,
        )
        super().__init__(relaxation, outer=outer, seed=seed, compile=compile)


class HamiltonJacobi(InnerOuterCallback):
    """Proximal-point steps on an existing Trainer: the non-viscous Hamilton-Jacobi equation.

    See :func:`lightning_entropy.hamilton_jacobi`.

    Args:
        inner_steps: L, int >= 1.
        gamma: stiffness, 1/t, >= 0; ``"auto"`` measures its start.
        coupled: the spring inside the optimizer's momentum.
        reset_momentum: zero the optimizer's momentum at outer steps.
        outer_lr: step size of the outer step, > 0.
        outer_momentum: Nesterov momentum of the outer step, in [0, 1).
        outer: another outer optimizer; replaces both.
        compile: an inner step in one compiled pass over memory.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        inner_steps: int = 20,
        gamma: Gamma = ENTROPY_SCOPING,
        *,
        coupled: bool = False,
        reset_momentum: bool = False,
        outer_lr: Number = 1.0,
        outer_momentum: float = 0.0,
        outer: OuterFactory | None = None,
        compile: bool = False,
    ) -> None:
        relaxation = presets.hamilton_jacobi(
            inner_steps,
            gamma,
            coupled=coupled,
            reset_momentum=reset_momentum,
            outer_lr=outer_lr,
            outer_momentum=outer_momentum,
        )
        super().__init__(relaxation, outer=outer, compile=compile)


class HeatSmoothing(InnerOuterCallback):
    """Gaussian smoothing on an existing Trainer: gradients at randomly perturbed weights.

    See :func:`lightning_entropy.heat`. Weights are perturbed when a batch begins and x again when it has ended; with
    gradient accumulation the same noise is drawn for every batch of a step, and in manual optimization new noise after
    each step. What is written into them in between would be lost and is a ``RuntimeError``.

    Args:
        inner_steps: gradients averaged per update, int >= 1.
        gamma: 1 / variance of the perturbation, > 0; relative to the squared filter norm with ``scale="filter"``.
        scale: ``"absolute"`` (the heat equation) or ``"filter"`` (LPF-SGD).
        seed: of the perturbation, >= 0.
        compile: the perturbation in one compiled pass over memory.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        inner_steps: int = 1,
        gamma: Number = 1e4,
        *,
        scale: Literal["absolute", "filter"] = "absolute",
        seed: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(presets.heat(inner_steps, gamma, scale=scale), seed=seed, compile=compile)
