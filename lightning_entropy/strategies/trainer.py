"""Replicas under the Trainer: every device, or group of devices, trains one, elastically tied to their mean."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_entropy.engine.outer_rules import OuterFactory
from lightning_entropy.methods import presets
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.strategies.compression import Format
from lightning_entropy.strategies.consensus_callback import acts, put_around
from lightning_entropy.strategies.lightning_internals import (
    confine_sync_batchnorm,
    set_device_mesh,
    shards_not_sent,
    start_method,
    timeout,
    wrap_in_group,
)
from lightning_entropy.strategies.options import ReplicaOptions, register
from lightning_entropy.strategies.outer_step_log import OuterStepLog
from lightning_entropy.strategies.replica import replica_loops
from lightning_entropy.strategies.replica_ddp import Moment
from lightning_entropy.strategies.replica_state import ReplicaState
from lightning_entropy.strategies.resumable_ddp import ResumableDDPStrategy
from lightning_entropy.strategies.sharding import check_sharding, has_shards, sync_shards
from lightning_entropy.strategies.start import initialize, seed_apart
from lightning_entropy.strategies.stopping import JointStop, OwnStop
from lightning_entropy.trainer.ownership import check_optimizers, claim, release
from lightning_entropy.trainer.progress import of_this_training, training_is_complete, warn_if_pinned, warn_if_short


class ElasticEntropyStrategy(ResumableDDPStrategy):
    r"""Train R replicas that share no gradients and pull each other's anchors together at outer steps.

    ``Trainer(strategy="elastic_entropy")`` is Parle, ``"elastic_sgd"`` Elastic-SGD; with :func:`local_sgd` or
    :func:`diloco` as ``relaxation`` it is those. Every replica runs the loop of :class:`Relaxation` on its own
    mini-batches, and

        x <- outer(x, x - z + rho (x - mean over replicas of x)).

    The mean is taken of the anchors as the last outer step left them, so it travels while the inner steps run, with no
    change in the result (``elastic_target="anchor"``). The other targets wait for it; with :func:`streaming_diloco` it
    is of a part of the weights and has some steps to arrive.

    What you evaluate, save and keep is the consensus: the mean of x over replicas, with floating-point buffers
    averaged. The module holds it from the start of validation, and from the end of an epoch, to the next training
    batch, and after fit; every checkpoint has it, weights-only included. A replica's own state goes to
    ``<checkpoint>.replicas/<r>.pt``: with it a resume is exact; without it, or with another R, all replicas start from
    the consensus, with a warning.

    Replicas meet at outer steps, at validation, at the end of an epoch and at saves, and nowhere else: nothing passes
    between them in a training batch, so one that is late costs the others nothing before the next meeting. Hence in a
    training batch ``self.log(..., sync_dist=True)``, ``self.all_gather`` and ``strategy.broadcast`` span the ranks of
    one replica; at validation and everywhere else they span all ranks, as does ``trainer.world_size``, and
    ``trainer.global_rank`` is that of all of them. Files, loggers and the progress bar are rank 0's. SIGTERM, Ctrl+C,
    a ``Timer`` and ``trainer.should_stop`` on any rank travel with the next meeting, and all ranks stop at its outer
    step. Two things still ask all ranks every batch: loaders of unknown length, and ``ModelCheckpoint`` with a
    ``train_time_interval``.

    What is not finite enters no mean. A replica whose weights become nan or inf is left out and restarts from the mean,
    with fresh momentum; so do its buffers. A rank that dies ends the job, within the process-group timeout and with an
    error that names it, and says why where it could.

    With ``membership="torchft"`` every replica is a job of its own, which may die, come back and join: see
    ``docs/elastic.md``. A meeting is then of whoever is there, and the consensus is the mean of the last one. A replica
    that comes takes the state of one that is training. A meeting in which one dies leaves out the pull, or puts off a
    common step; no inner loop is lost. The job's world, collectives, validation and stop flags are its own: one that
    stops leaves, and the others go on. Replica 0 logs and prints; the first that is there writes checkpoints, without
    the replicas' files. It logs ``entropy/replicas`` too, how many met.

    At outer steps, but not more often than the Trainer's ``log_every_n_steps``, it logs what the callbacks log and
    ``entropy/spread`` (rms per weight, over replicas, of x - mean; of the previous outer step),
    ``entropy/bytes_per_step`` (sent by this rank to other replicas per training step), ``entropy/peak_bytes`` (in its
    largest exchange so far) and ``entropy/seconds_waited`` (per training step, for exchanges to arrive; on CUDA, as
    seen by the host).

    A replica of several ranks is DDP over them, or sharded by FSDP2: where the module's ``configure_model`` calls
    ``fully_shard(layer, mesh=self.device_mesh["data_parallel"])`` for layers and for the whole (``device_mesh`` is None
    outside of a fit, where nothing is to be sharded), or a tensor-parallel plan on that mesh, whose ranks all see their
    replica's batches. Then each rank exchanges its own shards. The main checkpoint has
    whole weights, gathered on the first rank, and every rank's shards are in a file of its own; as many replicas go on
    from them exactly with other numbers of ranks, or with whole weights. After an exception nothing is saved, as it
    would take all ranks.

    Saving is a collective, so it does not belong in a signal handler: on SLURM, use
    ``SLURMEnvironment(auto_requeue=False)``.

    Step optimizers through the Trainer, as automatic optimization and ``self.optimizers()`` do: replicas count
    attempted steps, so that they stay together when a gradient scaler skips one.

    Args:
        relaxation: the method; None: ``parle()``.
        replicas: R, which divides the number of processes; each replica is then DDP, or FSDP2, over its share of them.
            ``"auto"``: every process is one.
        data: ``"all"``: every replica sees the whole training set in its own order, as in Parle. ``"shard"``: each
            sees a different R-th of every epoch. Loaders with a distributed sampler of their own are left alone.
        independent_init: all replicas but the first draw their own initial weights (by ``reset_parameters`` of the
            module itself or else of every submodule), instead of starting from the same.
        outer: makes the outer optimizer from the list of anchors, as in :func:`lightning_entropy.relax`.
        seed: of the noise and the random numbers, >= 0; None: rank 0's seed of torch's generator.
        communication_dtype: ``"float32"``; ``"bfloat16"`` sends half the bytes, ``"int8"`` a quarter and ``"int4"`` an
            eighth, with the rounding error added to the next round.
        overlap: False waits for every exchange at once. The result is the same.
        compile: an inner step in one compiled pass over memory, as in :func:`lightning_entropy.relax`; on CUDA also
            what is rounded for ``communication_dtype``.
        offload_anchor: x and the outer optimizer's state in the host's memory between outer steps, likewise.
        membership: ``"static"``: the replicas are this job's processes, from its start to its end. ``"torchft"``: every
            job is one, and ``TORCHFT_LIGHTHOUSE`` and ``REPLICA_GROUP_ID`` are in its environment.
        min_replicas: with torchft, how many must meet; fewer wait, and say so.
        **kwargs: of Lightning's ``DDPStrategy``: ``process_group_backend``, ``timeout`` (after which a rank that does
            not answer counts as gone; 60 s with torchft), ``start_method``, ``checkpoint_io`` (writes the main
            checkpoint), ``parallel_devices`` (may name one CUDA device several times; replicas that share one use gloo)
            and so on; and of ``DistributedDataParallel`` inside a replica, without effect if a replica is one process.

    Raises:
        ValueError: an argument outside its range, or a relaxation that perturbs instead of looping, or needs x at inner
            steps with ``offload_anchor``.
        TypeError: ``relaxation`` is not one, or ``compile`` or ``offload_anchor`` no bool.
        RuntimeError: at the start of fit: no C++ compiler, or on CUDA no Triton, for ``compile``.
        MisconfigurationException: at the start of fit: replicas that do not divide the processes; another owner of the
            loop, or a weight-averaging callback; parameters that are sharded over other ranks than their replica's.

    References:
        Chaudhari et al., Parle, 2017, arXiv:1707.00424; Zhang et al., Elastic averaging SGD, NeurIPS 2015,
        arXiv:1412.6651.
    """

    strategy_name = "elastic_entropy"

    def __init__(
        self,
        relaxation: Relaxation | None = None,
        replicas: int | Literal["auto"] = "auto",
        data: Literal["all", "shard"] = "all",
        independent_init: bool = False,
        outer: OuterFactory | None = None,
        seed: int | None = None,
        communication_dtype: Format = "float32",
        overlap: bool = True,
        compile: bool = False,
        offload_anchor: bool = False,
        membership: Literal["static", "torchft"] = "static",
        min_replicas: int = 1,
        **kwargs: Any,
    ) -> None:
        options = ReplicaOptions(
            presets.parle() if relaxation is None else relaxation,
            replicas,
            data,
            independent_init,
            outer,
            seed,
            communication_dtype,
            overlap,
            compile,
            offload_anchor,
            membership,
            min_replicas,
        )
        super().__init__(options, **kwargs)
        self._base_seed = 0  # common to all ranks
        self._stop = OwnStop()

    @property
    def bytes_sent(self) -> float:
        """What this rank has sent to other replicas at the outer steps of the fit that goes on; 0 outside of one."""
        return self._loops.traffic()[0] if self._loops else 0.0

    # Set-up

    def setup_environment(self) -> None:
        """Join the process group, refuse what cannot work, and arrange the processes into replicas."""
        if self.root_device.type == "mps":
            raise MisconfigurationException(f"{type(self).__name__} needs CPU or CUDA devices, got mps")
        super().setup_environment()
        self.grid.check(MisconfigurationException)
        self._watch(self.grid)
        if not self._fitting:
            return
        claim(self._trainer, self)
        several = self.grid.replicas > 1
        put_around(self._trainer, self, together=several)
        self._stop = JointStop(self._trainer, self.global_rank) if several else OwnStop()
        self._base_seed = self.options.common_seed(self.broadcast)
        self._state = ReplicaState(self.options, self.grid.data_parallel)
        self._members.prepare(self, self.grid)
        shape = (self.grid.replicas, self.grid.data_parallel)
        mesh = dist.init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replica", "data_parallel"))
        set_device_mesh(self._module, mesh)

    def setup(self, trainer: Trainer) -> None:
        """Wrap inside the replica, seed every replica's random numbers apart, and meet those that are other jobs."""
        if self._fitting:
            confine_sync_batchnorm(self, self._inside if self.grid.data_parallel > 1 else None)
        sharded = not self._fitting and has_shards(self._module)  # by a fit before
        with shards_not_sent(self._module) if sharded else nullcontext():
            super().setup(trainer)
        if self._fitting:
            seed_apart(self.grid, self._base_seed)
            position = self._members.join(self, self.grid)
            if position is not None:
                self._state.restored = position

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether a checkpoint is loaded when the other replicas, whose state may be newer, have been met."""
        return self._members.meets_first

    def configure_ddp(self) -> None:
        """Start all replicas from the same weights, or each from its own, and wrap in DDP what shares gradients."""
        module = self._module
        method, precision = start_method(self), self._trainer.precision
        sharded = check_sharding(module, self.options, self.grid, start_method=method, precision=precision)
        apart = self.options.independent_init and not self._state.resumed
        initialize(module, self.grid, self._base_seed, apart=apart)
        if sharded:
            assert module.device_mesh is not None
            sync_shards(module, module.device_mesh.get_group("replica"), self.grid.position)
        elif self.grid.data_parallel > 1:
            wrap_in_group(self, self._inside)
            super().configure_ddp()

    # Training

    def on_train_start(self) -> None:
        """Attach the loops: by now everything is restored and on its device."""
        if not acts(self._trainer):
            return
        self._members.begin(self._trainer.global_step)
        check_optimizers(self._module, self.optimizers)
        warn_if_pinned(self.options.relaxation, self.optimizers)
        warn_if_short(type(self).__name__, self.options.relaxation, self._trainer)
        relaxation = of_this_training(self.options.relaxation, self._trainer)
        self._loops = replica_loops(
            self._module,
            self.optimizers,
            replace(self.options, relaxation=relaxation),
            self.grid,
            seed=self._base_seed,
            timeout=timeout(self),
            meeting=self.meeting,
            bystander=lambda: not acts(self._trainer),
            assembly=self._members.assembly,
        )
        self._log = OuterStepLog(self._trainer)
        rank_zero_info(f"{type(self).__name__}: {self.options.describe(self.grid)}")
        self._state.restore(self._loops, self._module)

    def training_begins(self) -> None:
        """Let nothing tie the replicas batch by batch."""
        self._stop.install()

    def training_batch_started(self) -> None:
        """From here on nothing is asked of other replicas but at exchanges."""
        self._moment = Moment.STEP
        self.check_stop()

    def check_stop(self) -> None:
        """Stop alone, if this rank was told to and no exchange has come within seconds."""
        self._stop.check()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Put y back into the parameters, of the optimizers that there are now."""
        if self._loops is None or not acts(self._trainer):
            return
        self._log.poll()
        self._state.begin_batch(self._loops)
        if not self._loops.loops.are_of(self.optimizers):
            check_optimizers(self._module, self.optimizers)
            self._loops.follow(self.optimizers)
            rank_zero_info(f"{type(self).__name__}: the Trainer's optimizers have changed; new loops begin at x")
        self._stop.heed(self._loops)
        self._stop.tell(self._loops)
        self._loops.begin()
        self._log.begin(self._loops)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, and count the attempt; the outer step follows the last inner step."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._loops is None or not acts(self._trainer):
            return output
        if self._loops.count(optimizer):
            if self._loops.loops.loops[0].measure:
                self._log.write(self._loops)
            self._members.stepped(self._loops, self.grid, self._trainer.global_step + 1)
        return output

    def training_batch_ended(self, batch_idx: int) -> None:
        """Close the loops if this was the last batch, before the last validation and checkpoint; or stop here."""
        self._moment = Moment.CALLBACKS
        # From an epoch's last batch on Lightning resumes right once, and at the epoch's end always.
        self._members.give_state(self._loops, self._trainer, now=not self._trainer.is_last_batch)
        if training_is_complete(self._trainer, batch_idx):
            self._close()
        else:
            self._stop.heed(self._loops)

    def batch_is_over(self) -> None:
        """Let the Trainer go on where it wants to stop, until all replicas can."""
        self._moment = Moment.BETWEEN
        self._stop.hold()

    def training_epoch_ended(self) -> None:
        """Show the consensus, and close the loops if the Trainer stops here: on its own, or with another rank."""
        self._moment = Moment.BETWEEN
        self._members.give_state(self._loops, self._trainer)
        if self._trainer.should_stop:
            self._close()
        self._state.end_epoch()
        self.show_consensus()
        self._stop.heed(self._loops)
        if self._trainer.should_stop:
            self._close()

    def training_ended(self) -> None:
        """Close the loops, wherever they are."""
        self._close()

    def _close(self) -> None:
        """Close unfinished loops, keeping the state from which a resume goes on. A collective."""
        if self._loops is None or self._trainer.interrupted:
            return
        if self._state.close(self._loops, self._module):
            self.show_consensus()

    def on_train_end(self) -> None:
        """Give the result to a replica that has come to the last meeting."""
        self._members.give_state(self._loops, self._trainer)

    def failed(self, exception: BaseException) -> None:
        """Log what has arrived, and tell the other ranks why this one leaves."""
        if self._loops is not None:
            self._log.poll()
        super().failed(exception)

    def teardown(self) -> None:
        """Leave the consensus in the module and no hook behind."""
        self._members.leave()
        if self._loops is not None:
            if not self._leaving:
                self._state.leave(self._loops, self._module)
            self.end_heartbeat()
            self._loops.detach(close=not self._leaving)
            self._log.flush()
            self._loops = None
            release(self._trainer, self)
        self._stop.remove()
        self._stop = OwnStop()
        super().teardown()

    # The consensus

    @property
    def _is_alone(self) -> bool:
        """Whether the consensus is to be had without others: after an exception, or while one waits for this one."""
        return self._trainer.interrupted or self._members.wants_state

    def show_consensus(self) -> None:
        """Put the consensus into the module until the next training batch. A collective, unless it is there already."""
        self._moment = Moment.BETWEEN
        if self._loops is not None:
            self._log.flush()
            self._stop.tell(self._loops)
            self._loops.consensus.show(alone=self._is_alone)

    def on_validation_end(self) -> None:
        """Put y back, behind every callback and before the module puts back its own."""
        if self._loops is not None and acts(self._trainer):
            self._loops.consensus.hide()
            self._stop.heed(self._loops)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state dict of the consensus. A collective, except after an exception."""
        state = super().lightning_module_state_dict()
        return state if self._loops is None else self._loops.consensus.fill(state, alone=self._is_alone)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register ``elastic_entropy`` and ``elastic_sgd`` with the forms that Lightning's ``ddp`` has."""
        register(cls, strategy_registry)
