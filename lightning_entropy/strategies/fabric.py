"""Replicas under Lightning Fabric: the same loops and exchanges as under the Trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.seed import reset_seed
from torch.nn import Module
from torch.optim import Optimizer

from lightning_entropy.engine.outer_rules import OuterFactory
from lightning_entropy.engine.shards import is_sharded
from lightning_entropy.methods import presets
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.strategies import checkpoint
from lightning_entropy.strategies.checkpoint import ReplicaFiles, new_run
from lightning_entropy.strategies.compression import Format
from lightning_entropy.strategies.lightning_internals import (
    backend,
    converted,
    timeout,
    without_gradient_sync,
    wrap_in_group,
)
from lightning_entropy.strategies.links import data_parallel_group
from lightning_entropy.strategies.liveness import Heartbeat, meeting, watch
from lightning_entropy.strategies.loaders import own_order
from lightning_entropy.strategies.options import Grid, OptionAttributes, ReplicaOptions, check_arguments, register
from lightning_entropy.strategies.rendezvous import join_after_restart
from lightning_entropy.strategies.replica import ReplicaLoops, replica_loops
from lightning_entropy.strategies.start import initialize, seed_apart


class ElasticEntropyFabricStrategy(OptionAttributes, DDPStrategy):
    """``Fabric(strategy="elastic_entropy")``: see :class:`lightning_entropy.ElasticEntropyStrategy`.

    Set up the module and its optimizers together and once: ``fabric.setup(module, optimizer)``. Evaluate the consensus
    in ``with fabric.strategy.consensus():``, on all ranks. ``fabric.save`` writes the consensus, and each replica's own
    state beside it; ``fabric.load`` with the same module and optimizers resumes exactly.

    Args:
        relaxation: the method; None: ``parle()``.
        replicas: R, which divides the number of processes, or ``"auto"``: every process is one.
        data: ``"all"`` or ``"shard"``: for ``fabric.setup_dataloaders``.
        independent_init: replicas start from different weights.
        outer: makes the outer optimizer from the list of anchors.
        seed: of the noise and the random numbers, >= 0; None: rank 0's seed of torch's generator.
        communication_dtype: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``.
        overlap: False waits for every exchange at once.
        compile: an inner step in one compiled pass over memory, as in :func:`lightning_entropy.relax`; on CUDA also
            what is rounded for ``communication_dtype``.
        offload_anchor: x and the outer optimizer's state in the host's memory between outer steps, likewise.
        **kwargs: of Fabric's ``DDPStrategy``, and of ``DistributedDataParallel`` inside a replica.

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
        compile: bool = False,
        offload_anchor: bool = False,
        **kwargs: Any,
    ) -> None:
        self.options = ReplicaOptions(
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
        )
        check_arguments(type(self), DDPStrategy, kwargs)
        super().__init__(**kwargs)
        self._loops: ReplicaLoops | None = None
        self._module: Module | None = None
        self._heartbeat: Heartbeat | None = None

    @property
    def grid(self) -> Grid:
        """Where this process stands among replicas."""
        return self.options.grid(self.global_rank, self.world_size)

    def setup_environment(self) -> None:
        """Join the process group, and seed every replica's random numbers apart."""
        assert self.cluster_environment is not None
        join_after_restart(self.cluster_environment, backend(self), self.root_device, timeout(self))
        super().setup_environment()
        self.grid.check(ValueError)
        reset_seed()
        self._heartbeat = watch(self.grid, self.cluster_environment)
        self._base_seed = self.options.common_seed(self.broadcast)
        self._files = ReplicaFiles(self.grid, new_run(self.broadcast), self.barrier)
        self._inside = data_parallel_group(self.grid)
        seed_apart(self.grid, self._base_seed)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The whole set in an order of its own for every replica, or a shard."""
        return super().distributed_sampler_kwargs if self.options.data == "shard" else own_order(self.grid)

    def setup_module(self, module: Module) -> Any:
        """Start all replicas from the same weights, or each from its own, and wrap in DDP what shares gradients.

        Raises:
            ValueError: the module's parameters are sharded.
        """
        if is_sharded(module.parameters()):
            raise ValueError(
                f"parameters must not be sharded for {type(self).__name__}, got a DTensor: for sharded replicas use "
                "the Trainer with ElasticEntropyStrategy"
            )
        initialize(module, self.grid, self._base_seed, apart=self.options.independent_init)
        if self._inside is None:
            without_gradient_sync(self)
            return module
        wrap_in_group(self, self._inside)
        return super().setup_module(module)

    def setup_module_and_optimizers(self, module: Module, optimizers: list[Optimizer], scheduler: Any = None) -> Any:
        """Attach a loop to every optimizer."""
        if self._loops is not None:
            raise ValueError(f"{type(self).__name__} must be set up with one module, got a second")
        wrapped, optimizers, scheduler = super().setup_module_and_optimizers(module, optimizers, scheduler)
        self._module = module
        self._loops = replica_loops(
            module,
            optimizers,
            self.options,
            self.grid,
            seed=self._base_seed,
            timeout=timeout(self),
            meeting=lambda where: meeting(self._heartbeat, where),
        )
        return wrapped, optimizers, scheduler

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Step, and count the attempt; the outer step follows the last inner step."""
        if self._loops is not None:
            self._loops.begin()
        output = super().optimizer_step(optimizer, **kwargs)
        if self._loops is not None:
            self._loops.count(optimizer)
        return output

    def metrics(self) -> dict[str, Any]:
        """Return gamma, rho, the outer step and the replicas' spread, for a logger."""
        return {} if self._loops is None else self._loops.metrics()

    def close_loops(self) -> None:
        """End unfinished loops with what they have, so that the last steps of a training count. A collective.

        Call it when training has ended; what is saved after it cannot go on as if it had not been called.
        """
        if self._loops is not None:
            self._loops.close()

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Put the consensus into the module, and the replica's own weights back at the end. A collective.

        Yields:
            Nothing. Weights that are changed inside the block become this replica's x.
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
        """Return the state dict of the consensus. A collective."""
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
        content = converted(self, state, filter)
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
        """Load the main file and, if the state has the module and its optimizers, this replica's own."""
        remainder = super().load_checkpoint(path, state, strict, weights_only)
        restored = checkpoint.load(remainder, path, self.grid, weights_only)
        if restored is None or self._loops is None or not isinstance(state, dict):
            return remainder
        for key, optimizer_state in restored.pop("optimizers", {}).items():
            if key in state:
                state[key].load_state_dict(optimizer_state)
        self._loops.load_state_dict(restored)
        return remainder

    def teardown(self) -> None:
        """Stop the heartbeat."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register ``elastic_entropy`` and ``elastic_sgd`` with the forms that Fabric's ``ddp`` has."""
        register(cls, strategy_registry)
