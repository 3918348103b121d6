"""The callback that drives the loops of a Trainer's optimizers in one process."""

import copy
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import initial_seed
from torch.optim import Optimizer

from lightning_entropy.engine.module_loops import ModuleLoops
from lightning_entropy.engine.offload import check_offload
from lightning_entropy.engine.outer_rules import OuterFactory, OuterStep
from lightning_entropy.methods.arguments import named
from lightning_entropy.methods.relaxation import Relaxation, check_relaxation
from lightning_entropy.methods.validation import check_bool, check_integer
from lightning_entropy.trainer import sharded
from lightning_entropy.trainer.batchnorm import RefreshBatchNorm, keeps_statistics
from lightning_entropy.trainer.metrics import OuterStepMetrics
from lightning_entropy.trainer.ownership import REPLICAS, check_optimizers, claim, release
from lightning_entropy.trainer.progress import (
    of_this_training,
    training_is_complete,
    warn_if_pinned,
    warn_if_short,
)
from lightning_entropy.trainer.resume import (
    check_loadable,
    check_method,
    check_state,
    check_states,
    loop_of_callback,
    shapes_of,
    warn_of_another,
)
from lightning_entropy.trainer.state_key import StateKey

FORMAT = 1  # of InnerOuterCallback.state_dict()


class InnerOuterCallback(Callback):
    """Run a :class:`Relaxation` on every optimizer of the Trainer: one training step is one inner step.

    Works with automatic and manual optimization, accumulation, clipping, every precision, compiled modules, DDP, and
    ModelParallelStrategy (FSDP2, tensor-parallel plans), whose ranks compute on their shards. The weights one keeps are
    the anchor x: validation, test, ``state_dict()`` and with it every kind of checkpoint, and the module after fit or
    after an exception hold x. Only code that reads the parameters directly between two training batches of an epoch may
    find y (with :class:`HeatSmoothing` it finds x there). What ``load_state_dict()`` puts into the module, at any
    moment, or anyone while x is shown, is the new x. A checkpoint loads without the callback, and one made without it
    loads with it. A second fit without ``ckpt_path`` starts at t = 0, as it makes new optimizers.

    When training ends in the middle of a loop, the loop is closed: its outer step comes early, before the last
    validation where the end is known by then (``max_steps``, ``max_epochs``), else when the last epoch ends. A
    checkpoint made then goes on as if the loop had not been closed. Constraints that a hook puts back after a step
    (clamped or normalised weights) hold for x: the outer step is taken inside the optimizer's step, so that the hook
    finds x in the parameters. Optimizers that are exchanged or added between two batches are followed.

    Beside it, ``StochasticWeightAveraging`` averages x, since it reads the weights between epochs;
    ``WeightAveraging`` and ``EMAWeightAveraging`` read them after a batch and average y (with :class:`HeatSmoothing`,
    x). Whoever swaps weights around a validation does so inside of it or around it: x is shown from
    ``on_validation_start``, before every other callback, to ``on_validation_end``, behind every other. The
    learning-rate and batch-size finders try the plain optimizer, in ``on_fit_start`` or at any later epoch.

    At outer steps, but not more often than the Trainer's ``log_every_n_steps``, it logs ``entropy/gamma``,
    ``entropy/rho``, ``entropy/inner_distance`` and ``entropy/mean_distance`` (rms per weight of y - x and z - x
    before the outer step), ``entropy/outer_step`` and ``entropy/effective_epochs`` (passes over the data, every
    gradient counted).

    Args:
        relaxation: the method, such as ``le.lookahead()``.
        outer: makes the outer optimizer from the list of anchors, as in :func:`lightning_entropy.relax`.
        seed: of the noise, >= 0; None: the seed of torch's generator, rank 0's where there are several.
        compile: an inner step in one compiled pass over memory, as in :func:`lightning_entropy.relax`.
        offload_anchor: x and the outer optimizer's state in the host's memory between outer steps, likewise.

    Raises:
        ValueError: ``offload_anchor`` with a method that needs x at inner steps.
        TypeError: ``relaxation`` is not one, or ``outer`` makes no torch optimizer.
        MisconfigurationException: at the start of fit: under FSDP (the first) or DeepSpeed, which put parameters
            together in tensors of their own; beside another owner of the loop; where a parameter is in two optimizers.
    """

    state_key = StateKey()  # type: ignore[assignment]

    @named
    def __init__(
        self,
        relaxation: Relaxation,
        *,
        outer: OuterFactory | None = None,
        seed: int | None = None,
        compile: bool = False,
        offload_anchor: bool = False,
    ) -> None:
        check_relaxation(relaxation)
        OuterStep(outer, relaxation.outer_momentum)  # refuses now what it would refuse when training starts
        self.relaxation = relaxation
        self.outer = outer
        self.seed = None if seed is None else check_integer("seed", seed, 0)
        self.compile = check_bool("compile", compile)
        self.offload_anchor = check_offload(offload_anchor, relaxation)
        self._loops: ModuleLoops | None = None
        self._state: dict[str, Any] = {}  # loaded for the next fit, or left by the last one
        self._resumed: dict[str, Any] = {}  # what this fit goes on from, until its first batch
        self._unclosed: list[dict[str, Any]] | None = None  # the loops' state before they were closed
        self._optimizer_states: list[Any] = []  # of the checkpoint that is being loaded
        self._loaded_from: Any = None  # path of that checkpoint
        self._trains = True
        self._metrics: OuterStepMetrics | None = None  # of the fit
        self._logged_at = 0  # global step
        self._outer_steps: list[int] = []  # before this batch
        self._validated_at: list[int] = []  # outer steps at the last validation
        self._modes: list[Any] = []  # of optimizers that have some, when x was shown
        self._said: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is trained."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise MisconfigurationException(
                f"strategy must keep parameters as tensors of their own for {type(self).__name__} (a single device, "
                f"ddp, or ModelParallelStrategy with fully_shard), got {type(trainer.strategy).__name__}: to shard the "
                "model, use ModelParallelStrategy, and call torch's fully_shard in the module's configure_model"
            )
        claim(trainer, self)
        self._validated_at, self._said = [], set()
        # First in line, so that no other callback's hook looks before x is shown; and last, to put y back.
        trainer.callbacks = [self, *self._others(trainer), HideAnchor(self)]  # type: ignore[attr-defined]
        self._state, self._resumed, self._unclosed = {}, {}, None

    def _others(self, trainer: Trainer) -> list[Callback]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in callbacks if c is not self and not isinstance(c, HideAnchor)]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the optimizers' states until there are optimizers to compare them with.

        Raises:
            ValueError: a state of ours that is not whole; an empty one is not loaded, so that it is looked at here.
        """
        states = checkpoint.get("callbacks", {})
        if self.state_key in states:
            check_state(type(self).__name__, states[self.state_key], FORMAT)
        elif other := loop_of_callback(checkpoint):
            warn_of_another(type(self).__name__, other)
        elif REPLICAS in checkpoint:
            warn_of_another(type(self).__name__, "ElasticEntropyStrategy")
        self._loaded_from = trainer.ckpt_path
        self._optimizer_states = checkpoint.get("optimizer_states", [])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse states that cannot be loaded, before Lightning loads those of optimizers and loops."""
        if self._state:
            outer = OuterStep(self.outer, self.relaxation.outer_momentum)
            # Of another number of optimizers it is another module's, or some come before the first batch: then we see.
            fits = len(self._state["loops"]) == len(trainer.optimizers)
            shapes = shapes_of(pl_module, trainer.optimizers) if fits else None
            check_state(type(self).__name__, self._state, FORMAT, shapes=shapes, outer=outer)
        check_loadable(self._state, trainer.optimizers, self._optimizer_states)
        self._optimizer_states = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the first moment at which everything is restored and on its device."""
        seed = trainer.strategy.broadcast(initial_seed() if self.seed is None else self.seed)
        check_optimizers(pl_module, trainer.optimizers)
        warn_if_pinned(self.relaxation, trainer.optimizers)
        warn_if_short(type(self).__name__, self.relaxation, trainer)
        self._loops = ModuleLoops(
            pl_module,
            trainer.optimizers,
            of_this_training(self.relaxation, trainer),
            outer=self.outer,
            seed=seed,
            compile=self.compile,
            offload_anchor=self.offload_anchor,
            several_steps=not pl_module.automatic_optimization,
            bystander=lambda: self not in trainer.callbacks,  # type: ignore[attr-defined]
        )
        self._loops.show()
        if self._state:
            params = dict(pl_module.named_parameters())
            path = trainer.strategy.broadcast(self._loaded_from)
            self._resumed, self._state = sharded.fetch(path, self._state, self.state_key, params), {}
            check_method(self._resumed, self._method(), self.seed)
            if len(self._resumed["loops"]) == len(trainer.optimizers):
                self._loops.load_state_dict(self._resumed["loops"])
        self._logged_at = trainer.global_step
        self._metrics = OuterStepMetrics(trainer)
        rank_zero_info(self._describe(trainer, pl_module))

    def _describe(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Say in a sentence what is going to happen."""
        steps = self.relaxation.inner_steps
        every = "at every optimizer step" if steps == 1 else f"every {steps} optimizer steps"
        said = f"{type(self).__name__}: the weights that you keep move {every}{alone(self.relaxation)}"
        refreshed = any(isinstance(c, RefreshBatchNorm) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if refreshed or not any(map(keeps_statistics, pl_module.modules())):
            return said
        return f"{said}; BatchNorm's statistics are of the weights in between, RefreshBatchNorm(20) re-estimates them"

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first backward pass: an epoch may have none (SWA's last, for BatchNorm)."""
        self._trains = not pl_module.automatic_optimization

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """Note that this epoch trains."""
        self._trains = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put y into the parameters, of the optimizers that there are now."""
        if self._loops is None:
            return
        if self._metrics is not None:
            self._metrics.poll()
        self._loops.resume()
        if self._unclosed is not None:  # training goes on after all
            self._loops.load_state_dict(self._unclosed)
            self._unclosed = None
        self._follow(trainer, pl_module, self._loops)
        self._loops.prepare()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = bool(trainer.loggers) and 0 < every <= trainer.global_step + 1 - self._logged_at
        for loop in self._loops.loops:
            loop.measure = due
            loop.distances = None
        self._outer_steps = [loop.outer_step for loop in self._loops.loops]

    def _follow(self, trainer: Trainer, pl_module: LightningModule, loops: ModuleLoops) -> None:
        """Attach to optimizers that have come since the last batch, and go on from a checkpoint with them."""
        resumed, self._resumed = self._resumed, {}
        if loops.are_of(trainer.optimizers):
            if resumed:
                check_states(resumed, trainer.optimizers)
            return
        before, now = _classes(loop.optimizer for loop in loops.loops), _classes(trainer.optimizers)
        check_optimizers(pl_module, trainer.optimizers)
        loops.follow(trainer.optimizers)
        rank_zero_info(
            f"{type(self).__name__}: the Trainer's optimizers were {before} and are {now}; the loops of those that are "
            "gone have left x, and new ones begin there"
        )
        if resumed.get("optimizers") == now:  # the exchange is older than the checkpoint
            loops.load_state_dict(resumed["loops"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take perturbations back; log an outer step, if it is time to; close the loops after the last batch."""
        if self._loops is None:
            return
        self._loops.unperturb()
        stepped = self._outer_steps != [loop.outer_step for loop in self._loops.loops]
        if stepped and any(loop.measure for loop in self._loops.loops):
            assert self._metrics is not None
            self._metrics.log(self._loops.metrics())
            self._logged_at = trainer.global_step
        if training_is_complete(trainer, batch_idx):
            self._close()

    def _close(self) -> None:
        """Close unfinished loops at the end of training, and keep the state from which a resume goes on."""
        if self._loops is None or self._unclosed is not None or not self._trains:
            return
        if not any(loop.unfinished for loop in self._loops.loops):
            return
        shown = self._loops.shown
        self._loops.resume()
        self._unclosed = copy.deepcopy(self._loops.state_dict(anchor=True))
        self._loops.close()
        if shown:
            self._loops.show()

    def _flush(self) -> None:
        if self._metrics is not None:
            self._metrics.flush()

    def _show(self) -> None:
        if self._loops is not None:
            self._loops.show()

    def settle(self) -> None:
        """Take outer steps that wait for someone to look."""
        for loop in [] if self._loops is None else self._loops.loops:
            loop.settle()

    def hide(self) -> None:
        """Put y back when a validation has ended."""
        names = [] if self._loops is None else self._loops.hide()
        if names and self.relaxation.has_anchor:
            self._warn_once(
                "written",
                f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''} were written while "
                f"{type(self).__name__} showed x to a validation: what was written is the new x, and training goes on "
                "from there. A callback that swaps weights for a validation must swap them back in it",
            )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            rank_zero_warn(message, stacklevel=2)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show x until the validation has ended."""
        self._show()
        self._flush()
        self._modes = _modes(trainer)
        if self._loops is None or not self.relaxation.has_anchor:
            return
        if self.relaxation.streams:  # x moves before a loop ends
            return
        at = [loop.outer_step for loop in self._loops.loops]
        if not any(at) and any(loop.inner_step for loop in self._loops.loops) and "unmoved" not in self._said:
            self._said.add("unmoved")
            rank_zero_info(
                f"{type(self).__name__}: validation sees the initial weights, as x moves for the first time after "
                f"inner_steps = {self.relaxation.inner_steps} optimizer steps"
            )
        if at == self._validated_at:
            self._warn_of_watchers(trainer)
        self._validated_at = at

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuse optimizers that have put other weights into the parameters since x is shown.

        Raises:
            MisconfigurationException: the mode of an optimizer that has two has changed.
        """
        if self._loops is None or self._modes == _modes(trainer) or not self.relaxation.has_anchor:
            return
        names = " and ".join(sorted({type(optimizer).__name__ for optimizer in trainer.optimizers}))
        raise MisconfigurationException(
            f"{names} must not change its weights by eval() while {type(self).__name__} shows x: call eval() in "
            "on_validation_model_eval() and train() in on_validation_model_train() of the LightningModule, which are "
            "around it"
        )

    def _warn_of_watchers(self, trainer: Trainer) -> None:
        """Warn once, where somebody counts validations without improvement, that two are of the same weights."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        watchers = {type(c).__name__ for c in callbacks if isinstance(c, EarlyStopping)}
        watchers |= {"ReduceLROnPlateau" for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
        if watchers:
            self._warn_once(
                "watchers",
                f"two validations had the same weights, as no outer step of {self.relaxation.inner_steps} training "
                f"steps came between, which {' and '.join(sorted(watchers))} may take for no improvement: validate "
                "less often, or raise the patience",
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show x until the next training batch."""
        if trainer.should_stop:
            self._close()
        self._show()
        self._flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave x; y stays beside it for the checkpoint that follows."""
        self._close()
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
                self._loops, self._unclosed = None, None
            self._flush()
            self._metrics = None

    def state_dict(self) -> dict[str, Any]:
        """Return y, z, the counters and the outer optimizer of every loop, as if none had been closed."""
        if self._loops is None:
            return self._state
        return {
            "format": FORMAT,
            "loops": self._loops.state_dict() if self._unclosed is None else self._unclosed,
            "method": self._method(),
            "optimizers": _classes(loop.optimizer for loop in self._loops.loops),
        }

    def _method(self) -> dict[str, Any]:
        """Return what a resumed run should have in common with this one, as plain values."""
        outer = self.outer if self.outer is None or hasattr(self.outer, "__qualname__") else type(self.outer)
        return {
            **self.relaxation.describe(),
            "outer": None if outer is None else f"{outer.__module__}.{outer.__qualname__}",
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make the state one that the strategy can save, where it has shards."""
        sharded.put_away(trainer, checkpoint, self.state_key)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers are there; in the middle of a fit, go back to it.

        Raises:
            ValueError: a newer format, or a state that is not whole or not of these parameters; nothing has changed.
        """
        check_state(type(self).__name__, state_dict, FORMAT)
        if self._loops is None:
            self._state = state_dict
        elif len(state_dict["loops"]) == len(self._loops.loops):
            self._loops.load_state_dict(state_dict["loops"])
            self._unclosed = None


class HideAnchor(Callback):
    """The last callback in line: puts y back when every other has ended its validation."""

    def __init__(self, owner: InnerOuterCallback) -> None:
        self._owner = owner

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move an x that follows y before a module that puts other weights in for a validation does so."""
        if is_overridden("on_validation_model_eval", pl_module):
            self._owner.settle()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put y back, before the module's own hooks put theirs."""
        self._owner.hide()


def alone(relaxation: Relaxation) -> str:
    """Return what a method with replicas is without others, and how to have them; nothing of a method of one process.

    Example:
        >>> from lightning_entropy import diloco, lookahead
        >>> "in one process it is SNOO with H = 500, outer_lr = 0.7 and outer_momentum = 0.9" in alone(diloco())
        True
        >>> alone(lookahead())
        ''
    """
    one = relaxation.fragments == 1 and relaxation.delay == 0
    if not relaxation.outer_target.common and not callable(relaxation.rho) and relaxation.rho == 0:
        return ""
    if relaxation.inner_steps == 1 and one:  # gpa
        return ""
    if not one or relaxation.gamma != 0 or relaxation.noise != 0 or relaxation.average != 1:
        then = "the loop without the others' part"
    elif relaxation.outer_momentum:
        then = (
            f"SNOO with H = {relaxation.inner_steps}, outer_lr = {relaxation.outer_lr} and outer_momentum = "
            f"{relaxation.outer_momentum}"
        )
    elif relaxation.outer_lr == 1:
        then = "your optimizer, unchanged"
    else:
        then = f"lookahead({relaxation.inner_steps}, {relaxation.outer_lr})"
    return (
        f"; in one process it is {then}, as there are no replicas to average with "
        "(strategy=ElasticEntropyStrategy(relaxation) has them)"
    )


def _classes(optimizers: Iterable[Optimizer]) -> list[str]:
    return [type(optimizer).__name__ for optimizer in optimizers]


def _modes(trainer: Trainer) -> list[Any]:
    """Return in which mode optimizers are that have one for training and one for evaluation (schedule-free ones)."""
    return [group.get("train_mode") for optimizer in trainer.optimizers for group in optimizer.param_groups]
