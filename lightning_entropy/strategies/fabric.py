"""Replicas under Lightning Fabric: the sibling of the Trainer's strategy, over the same loops and exchanges."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.seed import reset_seed
from torch.nn import Module
from torch.optim import Optimizer

from lightning_entropy.engine.outer_rules import OuterFactory
from lightning_entropy.methods import presets
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.strategies import checkpoint as replica_files
from lightning_entropy.strategies.checkpoint import ReplicaFiles
from lightning_entropy.strategies.compression import Format
from lightning_entropy.strategies.liveness import Heartbeat
from lightning_entropy.strategies.loaders import initialize_apart, seed_all, sync_weights
from lightning_entropy.strategies.rendezvous import join_after_restart
from lightning_entropy.strategies.replica import SEED_STRIDE, Grid, ReplicaLoops, check_arguments, data_parallel_group


class ElasticEntropyFabricStrategy(DDPStrategy):
    """``Fabric(strategy="elastic_entropy")``: see :class:`lightning_entropy.ElasticEntropyStrategy`.

    Set up the module and its optimizers together, ``fabric.setup(module, optimizer)``, once. Look at the consensus in
    ``with fabric.strategy.consensus():``, on all ranks. ``fabric.save`` writes the consensus, and each replica's own
    state beside it; ``fabric.load`` with the same module and optimizers goes on exactly.

    Args:
        relaxation: the method; None: ``parle()``.
        replicas: R, which divides the number of processes, or ``"auto"``: every process is one.
        data: ``"all"`` or ``"shard"``: for ``fabric.setup_dataloaders``.
        independent_init: replicas start from different weights.
        outer: makes the outer optimizer from the list of anchors.
        seed: of noise and order, >= 0; None: rank 0's seed of torch's generator.
        communication_dtype: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        overlap: False waits for every exchange at once.
        accelerator: this and the following as for Fabric's ``DDPStrategy``.
        parallel_devices: one per process.
        cluster_environment: who is who.
        checkpoint_io: writes the main checkpoint.
        precision: of Fabric.
        process_group_backend: ``"nccl"`` or ``"gloo"``.
        timeout: after which a rank that does not answer counts as gone.
        start_method: of the processes.
        **kwargs: of ``DistributedDataParallel`` inside a replica.

    Raises:
        ValueError: an argument outside its range; replicas that do not divide the processes; a second set-up.
        TypeError: ``relaxation`` is not one.
    """

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
        precision: Precision | None = None,
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
            precision=precision,
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
        self._module: Module | None = None
        self._heartbeat: Heartbeat | None = None

    @property
    def grid(self) -> Grid:
        """Where this process stands among replicas."""
        return Grid(self.global_rank, self.world_size, self.world_size if self.replicas == "auto" else self.replicas)

    def _setup_distributed(self) -> None:
        assert self.cluster_environment is not None
        backend = self._get_process_group_backend()
        join_after_restart(self.cluster_environment, backend, self.root_device, self._timeout)
        super()._setup_distributed()

    def setup_environment(self) -> None:
        """Join the process group, and let every replica's random numbers go their own way."""
        super().setup_environment()
        if self.world_size % self.grid.replicas:
            raise ValueError(
                f"replicas must divide the number of processes ({self.world_size}), got {self.grid.replicas}"
            )
        reset_seed()
        if self.world_size > 1:
            assert self.cluster_environment is not None
            host = self.cluster_environment.main_address
            self._heartbeat = Heartbeat(self.global_rank, self.world_size, host, self.grid.data_parallel)
        self._base_seed = int(self.broadcast(torch.initial_seed() if self.seed is None else self.seed))
        self._files = ReplicaFiles(self.grid, replica_files.new_run(self.broadcast), self.barrier)
        self._inside = data_parallel_group(self.grid)
        if self.grid.replica > 0 or self.grid.data_parallel > 1:
            seed_all(self._base_seed + self.grid.replica * SEED_STRIDE)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The whole set in an order of its own for every replica, or a shard."""
        if self.data == "shard":
            return super().distributed_sampler_kwargs
        seed = int(os.getenv("PL_GLOBAL_SEED", "0")) + self.grid.replica * SEED_STRIDE
        return {"num_replicas": self.grid.data_parallel, "rank": self.grid.position, "seed": seed}

    def setup_module(self, module: Module) -> Any:
        """Give all replicas the same weights, or each its own, and wrap in DDP what shares gradients."""
        sync_weights(module)
        if self.independent_init and self.grid.replica > 0:
            initialize_apart(module, self._base_seed + self.grid.replica * SEED_STRIDE)
        if self.grid.data_parallel == 1:
            self._backward_sync_control = None  # type: ignore[assignment]
            return module
        self._ddp_kwargs = {**self._ddp_kwargs, "process_group": self._inside}
        return super().setup_module(module)

    def setup_module_and_optimizers(self, module: Module, optimizers: list[Optimizer], scheduler: Any = None) -> Any:
        """Attach a loop to every optimizer."""
        if self._loops is not None:
            raise ValueError(f"{type(self).__name__} must be set up with one module, got a second")
        wrapped, optimizers, scheduler = super().setup_module_and_optimizers(module, optimizers, scheduler)
        self._module = module
        self._loops = ReplicaLoops(
            module,
            optimizers,
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
        return wrapped, optimizers, scheduler

    def _named(self, error: RuntimeError) -> RuntimeError:
        return error if self._heartbeat is None else self._heartbeat.named(error)

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Step, and count the attempt; the outer step follows the last one."""
        if self._loops is not None:
            self._loops.begin()
        output = super().optimizer_step(optimizer, **kwargs)
        if self._loops is not None:
            self._loops.count(optimizer)
        return output

    def metrics(self) -> dict[str, Any]:
        """Give gamma, rho, the outer step and the replicas' spread, for a logger."""
        return {} if self._loops is None else self._loops.metrics()

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Put the consensus into the module, and the replica's own weights back at the end. A collective.

        Yields:
            Nothing. Weights that are changed in here become this replica's x.
        """
        if self._loops is None:
            yield
            return
        self._loops.consensus.show(alone=False)
        try:
            yield
        finally:
            self._loops.consensus.hide()

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        """Give the state dict of the consensus; a collective."""
        state = super().get_module_state_dict(module)
        ours = getattr(module, "module", module) is self._module
        return self._loops.consensus.fill(state, alone=False) if ours and self._loops is not None else state

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load weights into x."""
        with self.consensus():
            super().load_module_state_dict(module, state_dict, strict)

    def save_checkpoint(
        self, path: Any, state: dict[str, Any], storage_options: Any = None, filter: Any = None
    ) -> None:
        """Write the main file and every replica's own."""
        content = self._convert_stateful_objects_in_state(state, filter=filter or {})
        if self._loops is None:
            super().save_checkpoint(path, content, storage_options)
            return
        own = self._loops.state_dict()
        optimizers = {k: content[k] for k, v in state.items() if isinstance(v, Optimizer) and k in content}
        info = {"counters": ReplicaLoops.counters(own)}
        self._files.save(self.checkpoint_io, content, {"optimizers": optimizers, **own}, info, path, storage_options)

    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the main file and, where the module and its optimizers are asked for, this replica's own."""
        rest = super().load_checkpoint(path, state, strict, weights_only)
        restored = replica_files.load(rest, path, self.grid, weights_only)
        if restored is None or self._loops is None or not isinstance(state, dict):
            return rest
        for key, optimizer_state in restored.pop("optimizers", {}).items():
            if key in state:
                state[key].load_state_dict(optimizer_state)
        self._loops.load_state_dict(restored)
        return rest

    def teardown(self) -> None:
        """End the heartbeat."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register ``elastic_entropy`` and ``elastic_sgd`` with the forms that Fabric's ``ddp`` has."""
        register(cls, strategy_registry)


def register(strategy: type, registry: _StrategyRegistry) -> None:
    """Register a strategy as ``elastic_entropy`` and ``elastic_sgd``, with ``_spawn``, ``_fork`` and ``_notebook``.

    A name that is there is replaced, so that a module may be imported twice.
    """
    for name, relaxation in (("elastic_entropy", presets.parle()), ("elastic_sgd", presets.elastic_sgd())):
        for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            registry.register(
                name + suffix,
                strategy,
                description=f"Replicas without shared gradients ({name}), start_method={start_method!r}",
                override=True,
                relaxation=relaxation,
                start_method=start_method,
            )
