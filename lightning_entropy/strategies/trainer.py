"""Replicas under the Trainer: every device, or group of devices, trains one, elastically tied to their mean."""

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_entropy.engine.outer_rules import OuterFactory
from lightning_entropy.engine.shards import Gathered, is_sharded
from lightning_entropy.methods import presets
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.strategies import checkpoint as replica_files
from lightning_entropy.strategies.checkpoint import ReplicaFiles
from lightning_entropy.strategies.compression import Format
from lightning_entropy.strategies.consensus_callback import AfterCallbacks, ShowConsensus
from lightning_entropy.strategies.lightning_internals import (
    asks_every_batch,
    confine_sync_batchnorm,
    number_process,
    put_first,
    put_last,
    restore_from,
    set_device_mesh,
    start_method,
    timeout,
    wrap_in_group,
)
from lightning_entropy.strategies.loaders import even_end, own_order
from lightning_entropy.strategies.options import ReplicaOptions, register
from lightning_entropy.strategies.outer_step_log import OuterStepLog
from lightning_entropy.strategies.replica import ReplicaLoops, replica_loops
from lightning_entropy.strategies.replica_ddp import Moment, ReplicaDDPStrategy
from lightning_entropy.strategies.resharding import places_of
from lightning_entropy.strategies.sharding import (
    check_sharding,
    gathered,
    module_state,
    optimizer_state,
    own_parts,
    sync_shards,
    with_shards,
)
from lightning_entropy.strategies.start import initialize, rng_state, seed_apart, set_rng_state
from lightning_entropy.strategies.stopping import JointStop
from lightning_entropy.strategies.torchft.assembly import Assembly
from lightning_entropy.strategies.torchft.delegation import Delegation
from lightning_entropy.strategies.torchft.internals import check_installed
from lightning_entropy.strategies.torchft.join import LIGHTHOUSE, PEER, join, lighthouse_address
from lightning_entropy.strategies.torchft.status import report
from lightning_entropy.trainer.ownership import check_optimizers, claim, release
from lightning_entropy.trainer.progress import training_is_complete, warn_if_pinned, warn_if_short
from lightning_entropy.trainer.resume import check_loadable, check_method, is_callbacks, warn_of_another

SILENCE = timedelta(seconds=60)  # after which a peer that is alive and does not answer is left behind


# In a checkpoint, what is the same for all replicas; everything else is in each replica's own file too.
COMMON = ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "pytorch-lightning_version")


class ElasticEntropyStrategy(ReplicaDDPStrategy):
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
    outside of a fit, where nothing is to be sharded). Then each rank exchanges its own shards. The main checkpoint has
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
        compile: an inner step in one compiled pass over memory, as in :func:`lightning_entropy.relax`.
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
        if options.elastic:
            check_installed()
            kwargs.setdefault("timeout", SILENCE)
        super().__init__(options, **kwargs)
        self._loops: ReplicaLoops | None = None
        self._files: ReplicaFiles | None = None
        self._base_seed = 0  # common to all ranks
        self._resumed = False
        self._restored: dict[str, Any] | None = None  # loaded for the fit that begins
        self._left: dict[str, Any] | None = None  # by the fit that has ended
        self._unclosed: dict[str, Any] | None = None  # this replica's state before its loops were closed
        self._epoch_rng: dict[str, Any] | None = None  # of a checkpoint from an epoch's last batch, until the next one
        self._stop: JointStop | None = None  # of the fit, with several replicas
        self._assembly: Assembly | Delegation | None = None  # of the fit, where replicas come and go
        self._joins: dict[str, Any] | None = None  # the checkpoint of a replica that was there when this one came

    @property
    def _fitting(self) -> bool:
        # The process that started others for the fit has no part in it, and may have let go of the module since.
        return dist.is_initialized() and self._trainer.state.fn == TrainerFn.FITTING

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
        assert self.lightning_module is not None
        self._own_the_loop()
        if not self.options.elastic and LIGHTHOUSE in os.environ:
            rank_zero_warn(
                f"{LIGHTHOUSE} is set, and membership is 'static': this job meets no other. Replicas that come and go "
                f"need {type(self).__name__}(membership='torchft')"
            )
        self._left, self._restored, self._resumed = None, None, False
        self._unclosed, self._epoch_rng = None, None
        self._base_seed = self.options.common_seed(self.broadcast)
        self._files = ReplicaFiles(self.grid, replica_files.new_run(self.broadcast), self.barrier)
        shape = (self.grid.replicas, self.grid.data_parallel)
        mesh = dist.init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replica", "data_parallel"))
        set_device_mesh(self.lightning_module, mesh)

    def set_world_ranks(self) -> None:
        """Number the process; where every job is a replica, only the first's is the one that writes and prints."""
        super().set_world_ranks()
        if self.options.elastic:
            number_process(self.grid.replica * self.world_size + self.global_rank)

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes files, logs and prints."""
        return super().is_global_zero and not (self.options.elastic and self.grid.replica > 0)

    @property
    def _writes(self) -> bool:
        """Whether this process writes checkpoints: the first, or where replicas come and go the first that is there."""
        if not self.options.elastic:
            return self.is_global_zero
        there = [0] if self._assembly is None else self._assembly.present
        return self.global_rank == 0 and self.grid.replica == min(there)

    def _own_the_loop(self) -> None:
        """Refuse callbacks that would move or save other weights, and show the consensus before any callback looks."""
        claim(self._trainer, self)
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise MisconfigurationException(
                    f"{type(callback).__name__} would put the average of one replica's inner weights in the place of "
                    f"the consensus of {type(self).__name__}: remove one of them"
                )
        folders = [c.dirpath for c in self._trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if self.options.elastic and self._trainer.loggers and None in folders:
            rank_zero_warn(
                "ModelCheckpoint must have a dirpath that all replicas share where they come and go, got None: each "
                "job's logger has a folder of its own, so that ckpt_path='last' of one does not find another's"
            )
        put_first(self._trainer, ShowConsensus(self))
        self._stop = None
        if self.grid.replicas > 1:
            put_last(self._trainer, AfterCallbacks(self))
            self._stop = JointStop(self._trainer, self.global_rank)
            if any(map(asks_every_batch, self._trainer.callbacks)):  # type: ignore[attr-defined]
                rank_zero_warn(
                    "ModelCheckpoint(train_time_interval=...) asks all ranks every batch, which ties the replicas "
                    "to each other: every_n_train_steps does not"
                )

    def setup(self, trainer: Trainer) -> None:
        """Wrap inside the replica, and seed every replica's random numbers apart."""
        if self._fitting:
            confine_sync_batchnorm(self, self._inside if self.grid.data_parallel > 1 else None)
        super().setup(trainer)
        if self._fitting:
            seed_apart(self.grid, self._base_seed)
        if self._fitting and self.options.elastic:
            self._join()

    def _join(self) -> None:
        """Meet the other replicas, and take the state of one that is training."""
        assert self.lightning_module is not None
        lighthouse = lighthouse_address()
        limit = timeout(self)
        assert limit is not None
        alone = self.world_size == 1
        assembly: Assembly | None = None
        if self.global_rank == 0:
            assembly = Assembly(
                self.grid.replica,
                lighthouse,
                min_replicas=self.options.min_replicas,
                timeout=limit,
                check=self._end_if_told if alone else lambda: None,
            )
        self._assembly = assembly
        if not alone:
            self._assembly = Delegation(assembly, check=self._end_if_told, meeting=self._meeting, timeout=limit)
        assert self._assembly is not None
        state = join(self._assembly, self.lightning_module)
        self._joins = None
        if state is not None:
            self._joins = state["checkpoint"]
            self._restored = state["position"]
            restore_from(self._trainer, state["checkpoint"])
            if self.global_rank == 0:
                print(f"replica {self.grid.replica} joins at step {state['checkpoint']['global_step']}", flush=True)

    def _end_if_told(self) -> None:
        """End a wait for other replicas, who may never come, when this job is told to end."""
        assert self._assembly is not None
        if any(self._assembly.agree([self._trainer.received_sigterm])):
            raise SIGTERMException

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether a checkpoint is loaded when the other replicas, whose state may be newer, have been met."""
        return self.options.elastic

    @property
    def _waited_for(self) -> bool:
        """Whether a replica waits for this one's state: it must not be waited for then, as it would be in a meeting."""
        return self._assembly is not None and self._assembly.wants_state

    def _give_state(self, *, now: bool = True) -> None:
        """Give a replica that has come what ``fit(ckpt_path=...)`` would load.

        Args:
            now: False: only learn whether one waits for it.
        """
        if self._assembly is not None and self._loops is not None and self._assembly.asks() and now:
            self._loops.receive()
            self._trainer.save_checkpoint(PEER)

    def configure_ddp(self) -> None:
        """Start all replicas from the same weights, or each from its own, and wrap in DDP what shares gradients."""
        assert self.lightning_module is not None
        apart = self.options.independent_init and not self._resumed
        sharded = check_sharding(
            self.lightning_module,
            self.options,
            self.grid,
            start_method=start_method(self),
            precision=self._trainer.precision,
        )
        initialize(self.lightning_module, self.grid, self._base_seed, apart=apart)
        if sharded:
            assert self.lightning_module.device_mesh is not None
            across = self.lightning_module.device_mesh.get_group("replica")
            sync_shards(self.lightning_module, across, self.grid.position)
        elif self.grid.data_parallel > 1:
            wrap_in_group(self, self._inside)
            super().configure_ddp()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Training: the whole set in an order of its own for every replica, or a shard. Evaluation: a shard."""
        if not self._trainer.training or self.options.data == "shard":
            return super().distributed_sampler_kwargs
        return own_order(self.grid)

    def process_dataloader(self, dataloader: object) -> object:
        """Let training loaders of different lengths end with the shortest."""
        if self._trainer.training and self.world_size > 1:
            return even_end(dataloader, self._trainer.limit_train_batches)
        return dataloader

    # Training

    @property
    def _tries(self) -> bool:
        """Whether the Trainer runs without its callbacks, as a finder's trial does: of the plain optimizer."""
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        return not any(isinstance(callback, ShowConsensus) for callback in callbacks)

    def on_train_start(self) -> None:
        """Attach the loops: by now everything is restored and on its device."""
        if self._tries:
            return
        self._joins = None
        if isinstance(self._assembly, Delegation):
            self._assembly.check_start(self._trainer.global_step)
        assert self.lightning_module is not None
        check_optimizers(self.lightning_module, self.optimizers)
        warn_if_pinned(self.options.relaxation, self.optimizers)
        warn_if_short(type(self).__name__, self.options.relaxation, self._trainer)
        self._loops = replica_loops(
            self.lightning_module,
            self.optimizers,
            self.options,
            self.grid,
            seed=self._base_seed,
            timeout=timeout(self),
            meeting=self._meeting,
            bystander=lambda: self._tries,
            assembly=self._assembly,
        )
        self._log = OuterStepLog(self._trainer)
        rank_zero_info(f"{type(self).__name__}: {self.options.describe(self.grid)}")
        if self._restored is None:
            return
        restored, self._restored = self._restored, None
        if self._sharded:
            restored = with_shards(restored, dict(self.lightning_module.named_parameters()))
        self._loops.load_state_dict(restored)
        if "method" in restored:
            check_method(restored, self._method(), self.options.seed)
        if not restored.get("mid_epoch"):
            self._epoch_rng = restored.get("rng")
        elif "rng" in restored:
            # Making the loader's iterator has drawn a number, as it did at the start of the interrupted epoch.
            set_rng_state(restored["rng"])

    def _method(self) -> dict[str, Any]:
        """Return what a resumed run should have in common with this one, as plain values."""
        return {
            **self.options.relaxation.describe(),
            "data": self.options.data,
            "communication_dtype": self.options.communication_dtype,
            "data_parallel": self.grid.data_parallel,
        }

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Put y back into the parameters, of the optimizers that there are now."""
        if self._loops is None or self._tries:
            return
        self._epoch_rng = None
        self._log.poll()
        if self._unclosed is not None:  # training goes on after all
            self._loops.loops.resume()
            self._loops.load_state_dict(self._unclosed)
            self._unclosed = None
        if not self._loops.loops.are_of(self.optimizers):
            assert self.lightning_module is not None
            check_optimizers(self.lightning_module, self.optimizers)
            self._loops.follow(self.optimizers)
            rank_zero_info(f"{type(self).__name__}: the Trainer's optimizers have changed; new loops begin at x")
        self._stop_if_noticed()
        self._give_notice()
        self._loops.begin()
        due = self._log.due
        for loop in self._loops.loops.loops:
            loop.measure = due
            loop.distances = None

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, and count the attempt; the outer step follows the last inner step."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._loops is None or self._tries:
            return output
        if self._loops.count(optimizer):
            if self._loops.loops.loops[0].measure:
                self._log.write(self._loops)
            if self._assembly is not None and self.global_rank == 0:
                report(self._trainer.global_step + 1, self._loops.metrics())
        return output

    def training_begins(self) -> None:
        """Let nothing tie the replicas batch by batch."""
        if self._stop is not None:
            self._stop.install()

    def training_batch_started(self) -> None:
        """From here on nothing is asked of other replicas but at exchanges."""
        self._moment = Moment.STEP
        self.check_stop()

    def check_stop(self) -> None:
        """Stop alone, if this rank was told to and no exchange has come within seconds."""
        if self._stop is not None:
            self._stop.check()

    def _give_notice(self) -> None:
        if self._stop is not None and self._loops is not None:
            self._loops.give_notice(self._stop.wanted)

    def _stop_if_noticed(self) -> None:
        """Stop together with the other ranks, if any rank has asked for it in an exchange that all have seen."""
        if self._stop is not None and self._loops is not None and self._loops.take_notice():
            self._stop.act()

    def training_batch_ended(self, batch_idx: int) -> None:
        """Close the loops if this was the last batch, before the last validation and checkpoint; or stop here."""
        self._moment = Moment.CALLBACKS
        # From an epoch's last batch on Lightning resumes right once, and at the epoch's end always.
        self._give_state(now=not self._trainer.is_last_batch)
        if training_is_complete(self._trainer, batch_idx):
            self._close()
        else:
            self._stop_if_noticed()

    def batch_is_over(self) -> None:
        """Let the Trainer go on where it wants to stop, until all replicas can."""
        self._moment = Moment.BETWEEN
        if self._stop is not None:
            self._stop.hold()

    def training_epoch_ended(self) -> None:
        """Show the consensus, and close the loops if the Trainer stops here: on its own, or with another rank."""
        self._moment = Moment.BETWEEN
        self._give_state()
        if self._trainer.should_stop:
            self._close()
        if self._epoch_rng is not None:
            # Resumed from the validation of an epoch's last batch: making its iterator again has drawn a number.
            set_rng_state(self._epoch_rng)
            self._epoch_rng = None
        self.show_consensus()
        self._stop_if_noticed()
        if self._trainer.should_stop:
            self._close()

    def training_ended(self) -> None:
        """Close the loops, wherever they are."""
        self._close()

    def _close(self) -> None:
        """Close unfinished loops, and keep the state from which a resume goes on. A collective."""
        if self._loops is None or self._unclosed is not None or self._trainer.interrupted:
            return
        loops = self._loops.loops
        if not any(loop.unfinished for loop in loops.loops):
            return
        shown = loops.shown
        loops.resume()
        self._unclosed = copy.deepcopy(self._replica_state(self._loops))
        self._loops.close()
        if shown:
            self.show_consensus()

    # The consensus

    def show_consensus(self) -> None:
        """Put the consensus into the module until the next training batch. A collective, unless it is there already."""
        self._moment = Moment.BETWEEN
        if self._loops is not None:
            self._log.flush()
            self._give_notice()
            self._loops.consensus.show(alone=self._trainer.interrupted or self._waited_for)

    def on_validation_end(self) -> None:
        """Put y back, behind every callback and before the module puts back its own."""
        if self._loops is not None and not self._tries:
            self._loops.consensus.hide()
            self._stop_if_noticed()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state dict of the consensus. A collective, except after an exception."""
        state = super().lightning_module_state_dict()
        if self._loops is None:
            return state
        return self._loops.consensus.fill(state, alone=self._trainer.interrupted or self._waited_for)

    def failed(self, exception: BaseException) -> None:
        """Log what has arrived, and tell the other ranks why this one leaves."""
        if self._loops is not None:
            self._log.poll()
        super().failed(exception)

    def on_train_end(self) -> None:
        """Give the result to a replica that has come to the last meeting."""
        self._give_state()

    def teardown(self) -> None:
        """Leave the consensus in the module and no hook behind."""
        if self._assembly is not None:
            self._assembly.close()
            self._assembly = self._joins = None
        if self._loops is not None:
            self._left = None if self._leaving else self._replica_state(self._loops)
            self._loops.detach(close=not self._leaving)
            self._log.flush()
            self._loops = None
            release(self._trainer, self)
        if self._stop is not None:
            self._stop.remove()
            self._stop = None
        super().teardown()

    # Checkpoints

    def _replica_state(self, loops: ReplicaLoops) -> dict[str, Any]:
        state = loops.state_dict() if self._unclosed is None else self._unclosed
        return {
            **state,
            "rng": rng_state(),
            "mid_epoch": not self._trainer.is_last_batch,
            "method": self._method(),
            "optimizers": [type(loop.optimizer).__name__ for loop in loops.loops.loops],
            "parameters": [self._names(loop.params) for loop in loops.loops.loops],
        }

    def _names(self, params: list[Tensor]) -> list[str]:
        assert self.lightning_module is not None
        names: dict[Tensor, str] = {p: name for name, p in self.lightning_module.named_parameters()}
        return [names.get(p, "") for p in params]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the main file and every replica's own, so that a crash leaves the last ones whole."""
        if self._leaving and not dist.is_initialized():
            return  # the parent of spawned processes: they have saved what they trained, and it has trained nothing
        state = self._left if self._loops is None else self._replica_state(self._loops)
        sharded, parts = self._sharded, {k: v for k, v in checkpoint.items() if k not in COMMON}
        if sharded and self._trainer.interrupted:
            rank_zero_warn(f"{filepath} is not written after an exception: its weights are shards of several ranks")
            return
        if sharded and self.grid.replica == 0:
            checkpoint = gathered(checkpoint, keep=self.is_global_zero)
        if state is None or self._files is None or "optimizer_states" not in checkpoint:
            if self._writes:
                replica_files.save_whole(self.checkpoint_io, checkpoint, filepath, storage_options)
            return
        if self._assembly is not None and filepath == PEER:
            self._assembly.give_state({"checkpoint": checkpoint, "position": ReplicaLoops.position(state)})
            return
        if self.options.elastic:
            if self._writes:
                info = {replica_files.KEY: {"replicas": 0, "token": "", "counters": ReplicaLoops.counters(state)}}
                # One that was late may write yet what the next one, the first that is there, has begun to write.
                writer = str(self.grid.replica)
                replica_files.save_whole(
                    self.checkpoint_io, {**checkpoint, **info}, filepath, storage_options, writer=writer
                )
            return
        whole = {"checkpoint": parts, **state}
        if sharded:
            whole = {**own_parts(whole), "places": places_of(whole, state["parameters"])}
        self._files.save(
            self.checkpoint_io,
            checkpoint,
            whole,
            {"counters": ReplicaLoops.counters(state)},
            filepath,
            storage_options,
            alone=self._trainer.interrupted,
            sharded=sharded,
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the main file and, in fit, this replica's own; or take what a replica that is training has given."""
        if self._joins is not None:
            return self._joins
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if self._fitting:
            assert self.lightning_module is not None
            self._resumed = True
            if self.options.elastic:
                info = checkpoint.pop(replica_files.KEY, None)
                self._restored = None if info is None else {"counters": info["counters"]}
                self._warn_of_callback(checkpoint)
                return checkpoint
            sharded, params = self._sharded, dict(self.lightning_module.named_parameters())
            self._restored = replica_files.load(
                checkpoint, checkpoint_path, self.grid, weights_only, sharded=sharded, params=params
            )
            checkpoint.update((self._restored or {}).pop("checkpoint", {}))
            self._warn_of_callback(checkpoint)
        return checkpoint

    def _warn_of_callback(self, checkpoint: dict[str, Any]) -> None:
        """Warn where the checkpoint has no replicas, and the loop of a callback that this run does not have."""
        states = checkpoint.get("callbacks", {})
        other = next((key for key, state in states.items() if is_callbacks(state)), None)
        if self._restored is None and other is not None:
            warn_of_another(type(self).__name__, other)

    @property
    def _sharded(self) -> bool:
        """Whether the module's parameters are shards: seen when FSDP2 has none of them gathered."""
        assert self.lightning_module is not None
        Gathered(self.lightning_module).drop()
        return is_sharded(self.lightning_module.parameters())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, of which the file has the whole."""
        assert self.lightning_module is not None
        if self._sharded:
            checkpoint = {"state_dict": module_state(checkpoint["state_dict"], self.lightning_module)}
        super().load_model_state_dict(checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers, and the random state that they were saved with."""
        if self._sharded:
            states = zip(checkpoint["optimizer_states"], self.optimizers, strict=False)
            checkpoint = {"optimizer_states": [optimizer_state(state, optimizer) for state, optimizer in states]}
        if self._restored is not None:
            check_loadable(self._restored, self.optimizers, checkpoint["optimizer_states"])
        super().load_optimizer_state_dict(checkpoint)
        if self._restored is not None and "rng" in self._restored:
            set_rng_state(self._restored["rng"])
        if self._loops is not None:  # a finder puts back what its trial has changed; the loops have not been in it
            self._restored = None

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove the main file and the replicas' files."""
        if self.options.elastic:
            if self._writes:
                with suppress(FileNotFoundError):  # another replica, which was the first before, has removed it
                    self.checkpoint_io.remove_checkpoint(filepath)
            return
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            replica_files.remove(filepath)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register ``elastic_entropy`` and ``elastic_sgd`` with the forms that Lightning's ``ddp`` has."""
        register(cls, strategy_registry)
