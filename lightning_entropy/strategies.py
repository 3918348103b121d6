"""Replicas that share no gradients: every device, or group of devices, trains one, elastically tied to their mean."""

import os
import random
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, TorchCheckpointIO
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import _StrategyRegistry
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_entropy import presets, replica_files
from lightning_entropy.compression import FORMATS, Format
from lightning_entropy.consensus import Consensus
from lightning_entropy.coupling import Coupling, Links
from lightning_entropy.heartbeat import Heartbeat
from lightning_entropy.loops import Loops, claim
from lightning_entropy.outer import OuterFactory
from lightning_entropy.relaxation import Relaxation
from lightning_entropy.replica_data import GroupSyncBatchNorm, even_end, initialize_apart

SEED_STRIDE = 1_000_003  # between the seeds of two replicas: more epochs than anyone trains


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
    ``entropy/spread`` (rms per weight, over replicas, of x - mean; of the outer step before), ``entropy/bytes_per_step``
    (sent by this rank to other replicas per training step) and ``entropy/seconds_waited`` (per training step, for
    exchanges to arrive; on CUDA, what the host waits).

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
        if not isinstance(relaxation, Relaxation):
            raise TypeError(f"relaxation must be a Relaxation, got {type(relaxation).__name__}")
        if relaxation.perturb:
            raise ValueError("relaxation must not perturb: replicas have nothing to pull together without anchors")
        if replicas != "auto" and (isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1):
            raise ValueError(f"replicas must be 'auto' or an int >= 1, got {replicas!r}")
        if data not in ("all", "shard"):
            raise ValueError(f"data must be 'all' or 'shard', got {data!r}")
        if communication_dtype not in FORMATS:
            raise ValueError(f"communication_dtype must be one of {FORMATS}, got {communication_dtype!r}")
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
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
        self._links: list[Links] = []
        self._couplings: list[Coupling] = []
        self._loops: Loops | None = None
        self._consensus: Consensus | None = None
        self._heartbeat: Heartbeat | None = None
        self._restored: dict[str, Any] | None = None  # this replica's file, or where the loops of another R stood
        self._left: dict[str, Any] | None = None  # this replica's state after fit
        self._resumed = False
        self._saves = 0
        self._tokens: dict[str, str] = {}
        self._logged = (0, 0.0, 0.0)  # global step, bytes, seconds

    # Where this rank stands

    @property
    def n_replicas(self) -> int:
        """R."""
        return self.world_size if self.replicas == "auto" else self.replicas

    @property
    def data_parallel(self) -> int:
        """D, processes of one replica."""
        return self.world_size // self.n_replicas

    @property
    def replica(self) -> int:
        """The replica of this process, in [0, R)."""
        return self.global_rank // self.data_parallel

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
            return "gloo"
        return super()._get_process_group_backend()

    def setup_environment(self) -> None:
        """Join the process group, refuse what cannot work, and lay the grid of replicas."""
        if self.root_device.type == "mps":
            raise MisconfigurationException(f"{type(self).__name__} needs CPU or CUDA devices, got mps")
        super().setup_environment()
        if self.world_size % self.n_replicas:
            raise MisconfigurationException(
                f"replicas must divide the number of processes ({self.world_size}), got {self.n_replicas}"
            )
        if self.world_size > 1 and self._heartbeat is None:
            assert self.cluster_environment is not None
            self._heartbeat = Heartbeat(self.global_rank, self.world_size, self.cluster_environment.main_address)
        if not self._fitting:
            return
        claim(self._trainer, self)
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise MisconfigurationException(
                    f"{type(callback).__name__} would put the average of one replica's inner weights in the place of "
                    f"the consensus of {type(self).__name__}: remove one of them"
                )
        moments = [c for c in callbacks if not isinstance(c, _Moments)]
        self._trainer.callbacks = [_Moments(self), *moments]  # type: ignore[attr-defined]
        self._left, self._resumed = None, False
        if self.n_replicas > 1 or self.data_parallel > 1:
            names = ("replica", "data_parallel")
            shape = (self.n_replicas, self.data_parallel)
            assert self.lightning_module is not None
            self.lightning_module._device_mesh = dist.init_device_mesh(
                self.root_device.type, shape, mesh_dim_names=names
            )

    def setup(self, trainer: Trainer) -> None:
        """Wrap inside the replica, and let every replica's random numbers go their own way."""
        if self._fitting and self._layer_sync:
            group = self._inside
            self._layer_sync = None if group is None else GroupSyncBatchNorm(group)
        super().setup(trainer)
        if not self._fitting:
            return
        self._base_seed = int(self.broadcast(torch.initial_seed() if self.seed is None else self.seed))
        self._run = str(self.broadcast(uuid.uuid4().hex[:12]))
        if self.replica > 0 or self.data_parallel > 1:
            _seed_all(self._base_seed + self.replica * SEED_STRIDE)

    @property
    def _inside(self) -> Any:
        mesh = self.lightning_module._device_mesh if self.lightning_module is not None else None
        return None if mesh is None or self.data_parallel == 1 else mesh.get_group("data_parallel")

    def configure_ddp(self) -> None:
        """Give all replicas the same weights, or each its own, and wrap in DDP what shares gradients."""
        assert self.lightning_module is not None
        _sync_module_states(self.lightning_module)
        if self.independent_init and not self._resumed and self.replica > 0:
            seed = self.broadcast_seed() + self.replica * SEED_STRIDE
            initialize_apart(self.lightning_module, seed)
        elif self.independent_init:
            self.broadcast_seed()
        if self.data_parallel > 1:
            self._ddp_kwargs = {**self._ddp_kwargs, "process_group": self._inside}
            super().configure_ddp()

    def broadcast_seed(self) -> int:
        """Give rank 0's seed; a collective."""
        return int(self.broadcast(torch.initial_seed() if self.seed is None else self.seed))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Training: the whole set in an order of its own for every replica, or a shard. Evaluation: a shard."""
        kwargs: dict[str, Any] = super().distributed_sampler_kwargs
        if self._trainer.training and self.data == "all":
            seed = int(os.getenv("PL_GLOBAL_SEED", "0")) + self.replica * SEED_STRIDE
            return {"num_replicas": self.data_parallel, "rank": self.global_rank % self.data_parallel, "seed": seed}
        return kwargs

    def process_dataloader(self, dataloader: object) -> object:
        """Refuse training loaders that end at different steps; those of unknown length end with the first."""
        if self._trainer.training and self.world_size > 1:
            return even_end(dataloader, self._trainer.limit_train_batches)
        return dataloader

    # Training

    def on_train_start(self) -> None:
        """Attach the loops: everything is restored and on its device."""
        module, optimizers = self.lightning_module, self.optimizers
        assert module is not None
        if self.n_replicas > 1:
            self._links = [
                Links(self.n_replicas, self.data_parallel, self._timeout) for _ in range(len(optimizers) + 1)
            ]
            self._couplings = [
                Coupling(
                    links,
                    format=self.communication_dtype,
                    differences=self.relaxation.elastic_target != "pseudo_gradient",
                    overlap=self.overlap,
                    naming=self._name_the_lost,
                )
                for links in self._links[1:]
            ]
        self._loops = Loops(
            module,
            optimizers,
            self.relaxation,
            outer=self.outer,
            replica_mean=self._couplings or None,
            seed=self._base_seed + self.replica * SEED_STRIDE,
            count_attempts=True,
        )
        mean = Coupling(self._links[0], overlap=False, naming=self._name_the_lost) if self._links else None
        streams = self._couplings if self.relaxation.elastic_target == "anchor" else []
        self._consensus = Consensus(module, self._loops, mean, streams, every=self.independent_init)
        self._logged = (self._trainer.global_step, 0.0, 0.0)
        if self._restored is not None:
            self._restore_replica(self._restored)
            self._restored = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with y."""
        if self._loops is None or self._consensus is None:
            return
        self._consensus.hide()
        self._loops.begin()
        trainer = self._trainer
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = bool(trainer.loggers) and 0 < every <= trainer.global_step + 1 - self._logged[0]
        for loop in self._loops.loops:
            loop.measure = due
            loop.distances = None

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, and count the attempt; the outer step follows the last one."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._loops is None:
            return output
        for i, loop in enumerate(self._loops.loops):
            if loop.optimizer is not optimizer:
                continue
            before = loop.outer_step
            loop.advance()
            if loop.outer_step > before:
                self._after_outer_step(i)
            elif self._couplings:
                self._couplings[i].progress()
        return output

    def _after_outer_step(self, i: int) -> None:
        assert self._loops is not None
        assert self._consensus is not None
        loop = self._loops.loops[i]
        if self._couplings and self._couplings[i].round is not None:
            last = self._couplings[i].round
            assert last is not None
            if not last.finite:
                warnings.warn(
                    f"replica {self.replica} has nan or inf in its weights at outer step {loop.outer_step}: it is left "
                    "out of the mean and starts again from the consensus",
                    stacklevel=2,
                )
                loop.restart(last.wait())
                self._consensus.mend_buffers()
        if loop.measure:
            self._log()

    def _log(self) -> None:
        assert self._loops is not None
        trainer = self._trainer
        metrics = self._loops.metrics()
        step, sent, waited = self._logged
        steps = max(trainer.global_step + 1 - step, 1)
        totals = [sum(c.sent for c in self._couplings), sum(c.waited for c in self._couplings)]
        metrics["entropy/bytes_per_step"] = (totals[0] - sent) / steps
        metrics["entropy/seconds_waited"] = (totals[1] - waited) / steps
        for i, coupling in enumerate(self._couplings):
            if coupling.spread is not None:
                metrics["entropy/spread" if len(self._couplings) == 1 else f"entropy/{i}/spread"] = coupling.spread
        epoch_loop = trainer.fit_loop.epoch_loop
        if trainer.num_training_batches != float("inf"):
            metrics["entropy/effective_epochs"] = (epoch_loop.total_batch_idx + 1) / trainer.num_training_batches
        values = {key: float(value) for key, value in metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=epoch_loop._batches_that_stepped)
        self._logged = (trainer.global_step + 1, *totals)  # type: ignore[assignment]

    # Who sees the consensus

    def show_consensus(self) -> None:
        """Put the consensus into the module until the next training batch. A collective, unless it is there already."""
        if self._consensus is not None:
            self._consensus.show(alone=self._trainer.interrupted)

    def on_validation_start(self) -> None:
        """Show the consensus."""
        self.show_consensus()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Give the state dict of the consensus; a collective, but on the way out of an exception."""
        state = super().lightning_module_state_dict()
        return state if self._consensus is None else self._consensus.fill(state, alone=self._trainer.interrupted)

    def on_exception(self, exception: BaseException) -> None:
        """Say which rank is gone, where that is what happened."""
        super().on_exception(exception)
        if isinstance(exception, RuntimeError) and not isinstance(exception, ReplicaLost):
            named = self._name_the_lost(exception)
            if named is not exception:
                exception.args = (f"{named}",)

    def teardown(self) -> None:
        """Leave the consensus in the module and no hook behind."""
        if self._loops is not None:
            if not self._trainer.interrupted:
                self._left = self._replica_state()
            self._loops.detach()
        self._loops = self._consensus = None
        for links in self._links if not self._trainer.interrupted else []:
            links.close()
        self._links, self._couplings = [], []
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        super().teardown()

    # Checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the main file and every replica's own, so that a crash leaves the last ones whole."""
        state = self._left if self._loops is None else self._replica_state()
        if state is None or "optimizer_states" not in checkpoint:
            if self.is_global_zero:
                replica_files.save_whole(self.checkpoint_io, checkpoint, filepath, storage_options)
            return
        self._saves += 1
        token = f"{self._run}-{self._saves}"
        writes = self.global_rank % self.data_parallel == 0
        if writes:
            shared = {"state_dict", "hyper_parameters", "pytorch-lightning_version", "epoch", "global_step"}
            own = {key: value for key, value in checkpoint.items() if key not in shared}
            replica_files.stage({"token": token, "checkpoint": own, **state}, filepath, self.replica, token)
        self.barrier()
        if self.is_global_zero:
            counters = [{k: s[k] for k in ("outer_step", "gamma_start")} for s in state["loops"]]
            checkpoint[replica_files.KEY] = {"replicas": self.n_replicas, "token": token, "loops": counters}
            replica_files.save_whole(self.checkpoint_io, checkpoint, filepath, storage_options)
            del checkpoint[replica_files.KEY]
        self.barrier()
        if writes and type(self.checkpoint_io) is TorchCheckpointIO:
            replica_files.commit(filepath, self.replica, token)
        elif writes:
            # The main file may be written later: both saves' files stay, and a load picks by the token.
            replica_files.tidy(filepath, self.replica, keep={token, self._tokens.get(str(filepath), "")})
        self._tokens[str(filepath)] = token

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the main file and, to fit with as many replicas, this replica's own."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if not self._fitting:
            return checkpoint
        self._resumed = True
        info = checkpoint.pop(replica_files.KEY, None)
        if info is None:
            return checkpoint
        path = os.path.realpath(checkpoint_path) if replica_files.is_local(checkpoint_path) else checkpoint_path
        if info["replicas"] != self.n_replicas:
            rank_zero_warn(
                f"{path} has the state of {info['replicas']} replicas, and there are {self.n_replicas}: all of them "
                "start from the consensus, with the momentum of the first"
            )
            self._restored = {"counters": info["loops"]}
            return checkpoint
        own = replica_files.find(path, self.replica, info["token"])
        content, error = None, None
        if own is not None:
            try:
                content = replica_files.read(own, info["token"], weights_only)
            except replica_files.ReplicaFileError as caught:
                error = str(caught)
        missing = None if own is not None else f"{replica_files.folder(path)}/{self.replica}.pt"
        answers: list[Any] = [None] * self.world_size
        dist.all_gather_object(answers, (error, missing))
        errors = sorted({e for e, _ in answers if e is not None})
        if errors:
            raise replica_files.ReplicaFileError("; ".join(errors))
        gone = sorted({m for _, m in answers if m is not None})
        if gone:
            rank_zero_warn(
                f"{', '.join(gone)} missing: all replicas start from the consensus, with the momentum of the first"
            )
            self._restored = {"counters": info["loops"]}
            return checkpoint
        for extra in replica_files.surplus(path, self.n_replicas):
            rank_zero_warn(f"{extra} belongs to no replica of {path} and is not read")
        assert content is not None
        checkpoint.update(content.pop("checkpoint"))
        self._restored = content
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers, and then what set-up has made common to all replicas."""
        super().load_optimizer_state_dict(checkpoint)
        if self._restored is not None and "rng" in self._restored:
            replica_files.set_rng(self._restored["rng"])

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove the main file and the replicas' files."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            replica_files.remove(filepath)

    def _replica_state(self) -> dict[str, Any]:
        assert self._loops is not None
        assert self._consensus is not None
        repeat = self.relaxation.elastic_target == "anchor"
        batches = self._trainer.fit_loop.epoch_loop.batch_progress
        return {
            "loops": [loop.state_dict(anchor=True) for loop in self._loops.loops],
            "couplings": [coupling.state_dict(repeat=repeat) for coupling in self._couplings],
            "module": self._consensus.own(),
            "rng": replica_files.own_rng(),
            "mid_epoch": not batches.is_last_batch,
        }

    def _restore_replica(self, state: dict[str, Any]) -> None:
        assert self._loops is not None
        assert self._consensus is not None
        if "counters" in state:
            for loop, counters in zip(self._loops.loops, state["counters"], strict=True):
                start = {**loop.state_dict(), **counters, "inner_step": 0, "slots": {}}
                loop.load_state_dict(start)
            return
        self._consensus.load_own(state["module"])
        self._loops.load_state_dict(state["loops"])
        for coupling, memory in zip(self._couplings, state["couplings"], strict=True):
            coupling.load_state_dict(memory)
        if state["mid_epoch"]:
            # Making the loader's iterator has drawn a number, as it did at the start of the interrupted epoch.
            replica_files.set_rng(state["rng"])

    # Collectives: named errors, and none on the way out of an exception, where the others may not come

    def _name_the_lost(self, error: RuntimeError) -> RuntimeError:
        """Give an error that names the ranks that are gone; the same error where none is."""
        if isinstance(error, ReplicaLost) or self._heartbeat is None:
            return error
        silent = self._heartbeat.silent()
        if not silent:
            return error
        ranks = ", ".join(f"rank {rank} (replica {rank // self.data_parallel})" for rank in silent)
        return ReplicaLost(f"{ranks} stopped answering, and rank {self.global_rank} cannot go on: {error}")

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            named = self._name_the_lost(error)
            if named is error:
                raise
            raise named from error

    @property
    def _leaving(self) -> bool:
        module = self.lightning_module
        return module is not None and module._trainer is not None and self._trainer.interrupted

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
        for name, relaxation in (("elastic_entropy", presets.parle()), ("elastic_sgd", presets.elastic_sgd())):
            for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
                strategy_registry.register(
                    name + suffix,
                    cls,
                    description=f"Replicas without shared gradients ({name}), start_method={start_method!r}",
                    override=True,
                    relaxation=relaxation,
                    start_method=start_method,
                )


class ReplicaLost(RuntimeError):
    """A rank died or hangs; the message names it."""


class _Moments(Callback):
    """The moments for which a strategy has no hook, before every other callback's."""

    def __init__(self, strategy: ElasticEntropyStrategy) -> None:
        self._strategy = strategy

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._strategy.show_consensus()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._strategy.show_consensus()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._strategy.show_consensus()


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
