"""Replicas that share no gradients: every device, or group of devices, trains one, elastically tied to their mean."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import _StrategyRegistry
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_entropy.engine.outer_rules import OuterFactory
from lightning_entropy.methods import presets
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.strategies import checkpoint as replica_files
from lightning_entropy.strategies.checkpoint import ReplicaFiles
from lightning_entropy.strategies.compression import Format
from lightning_entropy.strategies.fabric import register
from lightning_entropy.strategies.liveness import Heartbeat
from lightning_entropy.strategies.loaders import (
    GroupSyncBatchNorm,
    even_end,
    initialize_apart,
    rng_state,
    seed_all,
    set_rng_state,
    sync_weights,
)
from lightning_entropy.strategies.rendezvous import join_after_restart
from lightning_entropy.strategies.replica import SEED_STRIDE, Grid, ReplicaLoops, check_arguments
from lightning_entropy.trainer.ownership import check_optimizers, claim, release
from lightning_entropy.trainer.progress import log_outer_step

# In a checkpoint, what is the same for all replicas; the rest each keeps in its own file too.
COMMON = ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "pytorch-lightning_version")


class ElasticEntropyStrategy(DDPStrategy):
    r"""Train R replicas that share no gradients and pull each other's anchors together at outer steps.

    ``Trainer(strategy="elastic_entropy")`` is Parle, ``"elastic_sgd"`` Elastic-SGD; with :func:`local_sgd` or
    :func:`diloco` as ``relaxation`` it is those. Every replica runs the loop of :class:`Relaxation` on its own
    mini-batches, and

        x <- outer(x, x - z + rho (x - mean over replicas of x)).

    The mean is taken of the anchors as the last outer step left them, so it travels while the inner steps run, with no
    change in the result (``elastic_target="anchor"``; the other targets wait for it).

    The consensus, mean of x over replicas with floating-point buffers averaged, is what everyone sees who looks: the
    module from the start of validation, and from the end of an epoch, to the next training batch; every checkpoint,
    weights-only included; the module after fit. A replica's own state goes to ``<checkpoint>.replicas/<r>.pt``; with it
    a resume is exact, without it, or with another R, all replicas start from the consensus, with a warning.

    A replica whose weights become nan or inf is left out of the mean and put back to it, with fresh momentum. A rank
    that dies ends the job, within the process-group timeout and with an error that names it.

    At outer steps, but not more often than the Trainer's ``log_every_n_steps``, it logs what the callbacks log and
    ``entropy/spread`` (rms per weight, over replicas, of x - mean; of the outer step before),
    ``entropy/bytes_per_step`` (sent by this rank to other replicas per training step) and ``entropy/seconds_waited``
    (per training step, for exchanges to arrive; on CUDA, what the host waits).

    Saving is a collective, so it does not belong into a signal handler: on SLURM, give the Trainer
    ``SLURMEnvironment(auto_requeue=False)``. Lightning itself broadcasts a flag before every batch of every
    multi-process fit: replicas run batch by batch together, and a link's latency is paid once a batch.

    Optimizers are to be stepped through the Trainer, as automatic optimization and ``self.optimizers()`` do: replicas
    count attempted steps, so that they stay together when a gradient scaler skips one.

    Args:
        relaxation: the method; None: ``parle()``.
        replicas: R, which divides the number of processes; each replica is then DDP over the others' share of it.
            ``"auto"``: every process is one.
        data: ``"all"``: every replica sees the whole training set in its own order, as Parle does. ``"shard"``: each
            sees another R-th of every epoch. Loaders with a distributed sampler of their own are left alone.
        independent_init: replicas start from different weights (``reset_parameters`` of every submodule, or of the
            module itself), all but the first, instead of from the same.
        outer: makes the outer optimizer from the list of anchors, as in :func:`lightning_entropy.relax`.
        seed: of noise and order, >= 0; None: rank 0's seed of torch's generator.
        communication_dtype: ``"float32"``; ``"bfloat16"`` sends half and ``"int8"`` a quarter, with what the rounding
            leaves out added to the next round.
        overlap: False waits for every exchange at once. The result is the same.
        accelerator: this and the following as for Lightning's ``DDPStrategy``.
        parallel_devices: may name one CUDA device several times; replicas that share one use gloo.
        cluster_environment: who is who.
        checkpoint_io: writes the main checkpoint.
        precision_plugin: of the Trainer.
        process_group_backend: ``"nccl"`` or ``"gloo"``.
        timeout: after which a rank that does not answer counts as gone.
        start_method: of the processes.
        **kwargs: of ``DistributedDataParallel`` inside a replica; without effect where a replica is one process.

    Raises:
        ValueError: an argument outside its range, or a relaxation that perturbs instead of looping.
        TypeError: ``relaxation`` is not one.
        MisconfigurationException: at the start of fit: replicas that do not divide the processes; another owner of the
            loop, or a weight-averaging callback; loaders of different lengths.

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
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **kwargs: Any,
    ) -> None:
        relaxation = presets.parle() if relaxation is None else relaxation
        check_arguments(relaxation, replicas, data, communication_dtype, seed)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **kwargs,
        )
        self.relaxation = relaxation
        self.replicas: int | Literal["auto"] = replicas
        self.data = data
        self.independent_init = independent_init
        self.outer = outer
        self.seed = seed
        self.communication_dtype: Format = communication_dtype
        self.overlap = overlap
        self._loops: ReplicaLoops | None = None
        self._files: ReplicaFiles | None = None
        self._heartbeat: Heartbeat | None = None
        self._base_seed = 0  # common to all ranks
        self._resumed = False
        self._restored: dict[str, Any] | None = None  # loaded for the fit that begins
        self._left: dict[str, Any] | None = None  # by the fit that has ended
        self._logged = (0, 0.0, 0.0)  # at the last log: global step, bytes sent, seconds waited

    @property
    def grid(self) -> Grid:
        """Where this process stands among replicas."""
        return Grid(self.global_rank, self.world_size, self.world_size if self.replicas == "auto" else self.replicas)

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def _fitting(self) -> bool:
        return self._trainer.state.fn == TrainerFn.FITTING

    # Set-up

    def _get_process_group_backend(self) -> str:
        devices = self.parallel_devices or []
        if self._process_group_backend is None and len(set(devices)) < len(devices) and self.root_device.type == "cuda":
            return "gloo"  # nccl refuses two ranks on one device
        return super()._get_process_group_backend()

    def setup_distributed(self) -> None:
        """Join the process group, also after torchrun has started the ranks again."""
        assert self.cluster_environment is not None
        backend = self._get_process_group_backend()
        join_after_restart(self.cluster_environment, backend, self.root_device, self._timeout)
        super().setup_distributed()

    def setup_environment(self) -> None:
        """Join the process group, refuse what cannot work, and lay the grid of replicas."""
        if self.root_device.type == "mps":
            raise MisconfigurationException(f"{type(self).__name__} needs CPU or CUDA devices, got mps")
        super().setup_environment()
        if self.world_size % self.grid.replicas:
            raise MisconfigurationException(
                f"replicas must divide the number of processes ({self.world_size}), got {self.grid.replicas}"
            )
        if self.world_size > 1 and self._heartbeat is None:
            assert self.cluster_environment is not None
            host = self.cluster_environment.main_address
            self._heartbeat = Heartbeat(self.global_rank, self.world_size, host, self.grid.data_parallel)
        if not self._fitting:
            return
        assert self.lightning_module is not None
        self._own_the_loop()
        self._left, self._restored, self._resumed = None, None, False
        self._base_seed = int(self.broadcast(torch.initial_seed() if self.seed is None else self.seed))
        self._files = ReplicaFiles(self.grid, replica_files.new_run(self.broadcast), self.barrier)
        self.lightning_module._device_mesh = dist.init_device_mesh(
            self.root_device.type,
            (self.grid.replicas, self.grid.data_parallel),
            mesh_dim_names=("replica", "data_parallel"),
        )

    def _own_the_loop(self) -> None:
        """Refuse callbacks that would move or save other weights, and look first at every moment."""
        claim(self._trainer, self)
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise MisconfigurationException(
                    f"{type(callback).__name__} would put the average of one replica's inner weights in the place of "
                    f"the consensus of {type(self).__name__}: remove one of them"
                )
        others = [callback for callback in callbacks if not isinstance(callback, ShowConsensus)]
        self._trainer.callbacks = [ShowConsensus(self), *others]  # type: ignore[attr-defined]

    @property
    def _inside(self) -> Any:
        """The process group of this replica's ranks."""
        assert self.lightning_module is not None
        assert self.lightning_module._device_mesh is not None
        return self.lightning_module._device_mesh.get_group("data_parallel")

    def setup(self, trainer: Trainer) -> None:
        """Wrap inside the replica, and let every replica's random numbers go their own way."""
        if self._fitting and self._layer_sync:
            self._layer_sync = GroupSyncBatchNorm(self._inside) if self.grid.data_parallel > 1 else None
        super().setup(trainer)
        if self._fitting and (self.grid.replica > 0 or self.grid.data_parallel > 1):
            seed_all(self._base_seed + self.grid.replica * SEED_STRIDE)

    def configure_ddp(self) -> None:
        """Give all replicas the same weights, or each its own, and wrap in DDP what shares gradients."""
        assert self.lightning_module is not None
        sync_weights(self.lightning_module)
        if self.independent_init and not self._resumed and self.grid.replica > 0:
            initialize_apart(self.lightning_module, self._base_seed + self.grid.replica * SEED_STRIDE)
        if self.grid.data_parallel > 1:
            self._ddp_kwargs = {**self._ddp_kwargs, "process_group": self._inside}
            super().configure_ddp()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Training: the whole set in an order of its own for every replica, or a shard. Evaluation: a shard."""
        if not self._trainer.training or self.data == "shard":
            return super().distributed_sampler_kwargs
        seed = int(os.getenv("PL_GLOBAL_SEED", "0")) + self.grid.replica * SEED_STRIDE
        return {"num_replicas": self.grid.data_parallel, "rank": self.grid.position, "seed": seed}

    def process_dataloader(self, dataloader: object) -> object:
        """Refuse training loaders that end at different steps; those of unknown length end with the first."""
        if self._trainer.training and self.world_size > 1:
            return even_end(dataloader, self._trainer.limit_train_batches)
        return dataloader

    # Training

    def on_train_start(self) -> None:
        """Attach the loops: everything is restored and on its device."""
        assert self.lightning_module is not None
        check_optimizers(self.lightning_module, self.optimizers)
        self._loops = ReplicaLoops(
            self.lightning_module,
            self.optimizers,
            self.relaxation,
            self.grid,
            outer=self.outer,
            seed=self._base_seed,
            communication_dtype=self.communication_dtype,
            overlap=self.overlap,
            apart=self.independent_init,
            timeout=self._timeout,
            naming=self._named,
        )
        self._logged = (self._trainer.global_step, 0.0, 0.0)
        if self._restored is None:
            return
        self._loops.load_state_dict(self._restored)
        if self._restored.get("mid_epoch"):
            # Making the loader's iterator has drawn a number, as it did at the start of the interrupted epoch.
            set_rng_state(self._restored["rng"])
        self._restored = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with y."""
        if self._loops is None:
            return
        self._loops.begin()
        every: int = self._trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = bool(self._trainer.loggers) and 0 < every <= self._trainer.global_step + 1 - self._logged[0]
        for loop in self._loops.loops.loops:
            loop.measure = due
            loop.distances = None

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, and count the attempt; the outer step follows the last one."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._loops is not None and self._loops.count(optimizer) and self._loops.loops.loops[0].measure:
            self._log(self._loops)
        return output

    def _log(self, loops: ReplicaLoops) -> None:
        trainer = self._trainer
        metrics = loops.metrics()
        now = (trainer.global_step + 1, *loops.traffic())
        steps, sent, waited = (new - old for new, old in zip(now, self._logged, strict=True))
        metrics["entropy/bytes_per_step"] = sent / max(steps, 1)
        metrics["entropy/seconds_waited"] = waited / max(steps, 1)
        log_outer_step(trainer, metrics)
        self._logged = now

    # Who sees the consensus

    def show_consensus(self) -> None:
        """Put the consensus into the module until the next training batch. A collective, unless it is there already."""
        if self._loops is not None:
            self._loops.consensus.show(alone=self._trainer.interrupted)

    def on_validation_start(self) -> None:
        """Show the consensus."""
        self.show_consensus()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Give the state dict of the consensus; a collective, but on the way out of an exception."""
        state = super().lightning_module_state_dict()
        return state if self._loops is None else self._loops.consensus.fill(state, alone=self._trainer.interrupted)

    def on_exception(self, exception: BaseException) -> None:
        """Say which rank is gone, where that is what happened."""
        super().on_exception(exception)
        if isinstance(exception, RuntimeError):
            named = self._named(exception)
            if named is not exception:
                exception.args = named.args

    def teardown(self) -> None:
        """Leave the consensus in the module and no hook behind."""
        if self._loops is not None:
            self._left = None if self._leaving else self._replica_state(self._loops)
            self._loops.detach(close=not self._leaving)
            self._loops = None
            release(self._trainer, self)
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        super().teardown()

    # Checkpoints

    def _replica_state(self, loops: ReplicaLoops) -> dict[str, Any]:
        mid_epoch = not self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        return {**loops.state_dict(), "rng": rng_state(), "mid_epoch": mid_epoch}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the main file and every replica's own, so that a crash leaves the last ones whole."""
        if self._leaving and not dist.is_initialized():
            return  # the parent of spawned processes, which have saved what they trained; here is nothing trained
        state = self._left if self._loops is None else self._replica_state(self._loops)
        if state is None or self._files is None or "optimizer_states" not in checkpoint:
            if self.is_global_zero:
                replica_files.save_whole(self.checkpoint_io, checkpoint, filepath, storage_options)
            return
        own = {key: value for key, value in checkpoint.items() if key not in COMMON}
        info = {"counters": ReplicaLoops.counters(state)}
        self._files.save(self.checkpoint_io, checkpoint, {"checkpoint": own, **state}, info, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the main file and, to fit, this replica's own."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if self._fitting:
            self._resumed = True
            self._restored = replica_files.load(checkpoint, checkpoint_path, self.grid, weights_only)
            checkpoint.update((self._restored or {}).pop("checkpoint", {}))
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers, and the random state that they were saved with."""
        super().load_optimizer_state_dict(checkpoint)
        if self._restored is not None and "rng" in self._restored:
            set_rng_state(self._restored["rng"])

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove the main file and the replicas' files."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            replica_files.remove(filepath)

    # Collectives: errors that name a rank, and none on the way out of an exception, where the others may not come

    def _named(self, error: RuntimeError) -> RuntimeError:
        return error if self._heartbeat is None else self._heartbeat.named(error)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            named = self._named(error)
            if named is error:
                raise
            raise named from error

    @property
    def _leaving(self) -> bool:
        module = self.lightning_module
        return module is not None and module._trainer is not None and module._trainer.interrupted

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks."""
        if not self._leaving:
            with self._naming():
                super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give rank ``src``'s object."""
        if self._leaving:
            return obj
        with self._naming():
            return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce over all ranks."""
        if self._leaving:
            return tensor
        with self._naming():
            return super().reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Agree on a decision."""
        return decision if self._leaving else super().reduce_boolean_decision(decision, all)

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register ``elastic_entropy`` and ``elastic_sgd`` with the forms that Lightning's ``ddp`` has."""
        register(cls, strategy_registry)


class ShowConsensus(Callback):
    """The moments for which a strategy has no hook, before every other callback's."""

    def __init__(self, strategy: ElasticEntropyStrategy) -> None:
        self._strategy = strategy

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show it to whoever looks at the end of an epoch."""
        self._strategy.show_consensus()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave it in the module."""
        self._strategy.show_consensus()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave in the module what is known without the others."""
        self._strategy.show_consensus()
