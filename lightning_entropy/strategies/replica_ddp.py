"""A DDP strategy of replicas: where a process stands, what it sees, which ranks Lightning's collectives span."""

from enum import Enum, auto
from operator import attrgetter
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_entropy.strategies.lightning_internals import backend, number_process, timeout
from lightning_entropy.strategies.loaders import even_end, own_order, same_in_replica
from lightning_entropy.strategies.membership import members
from lightning_entropy.strategies.options import Grid, OptionAttributes, ReplicaOptions, check_arguments
from lightning_entropy.strategies.rendezvous import join_alone
from lightning_entropy.strategies.sharding import has_plan
from lightning_entropy.strategies.watched_ddp import WatchedDDPStrategy


class Moment(Enum):
    """Where a Trainer is, seen from a training batch."""

    BETWEEN = auto()  # two batches: in a validation, say, or a save
    STEP = auto()  # from a batch's first hook to its optimizer step
    CALLBACKS = auto()  # when callbacks see the end of a batch


class ReplicaDDPStrategy(OptionAttributes, WatchedDDPStrategy):
    """DDP over all ranks, except in a training batch: there nothing may be asked of other replicas.

    Args:
        options: of the replicas.
        **kwargs: of Lightning's ``DDPStrategy``.
    """

    def __init__(self, options: ReplicaOptions, **kwargs: Any) -> None:
        self.options, self._members = options, members(options)
        check_arguments(type(self), DDPStrategy, kwargs)
        for name, value in self._members.defaults.items():
            kwargs.setdefault(name, value)
        super().__init__(**kwargs)  # in this form, by which a command line finds Lightning's arguments
        self._moment = Moment.BETWEEN

    membership = property(attrgetter("options.membership"))
    min_replicas = property(attrgetter("options.min_replicas"))

    def setup_distributed(self) -> None:
        """Join the process group; a replica of one rank that is a job of its own has nobody to find in it."""
        if self._members.own_jobs and self.num_nodes * self.num_processes == 1:
            join_alone(backend(self), self.root_device, timeout(self))
        super().setup_distributed()

    @property
    def grid(self) -> Grid:
        """Where this process stands among replicas."""
        return self.options.grid(self.global_rank, self.world_size)

    def set_world_ranks(self) -> None:
        """Number the process; where every job is a replica, only the first's is the one that logs and prints."""
        super().set_world_ranks()
        number_process(self.grid.first * self.world_size + self.global_rank)

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that logs and prints."""
        return super().is_global_zero and self.grid.first == 0

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trainer(self) -> Trainer:
        return self._module.trainer

    @property
    def _fitting(self) -> bool:
        # The process that started others for the fit has no part in it, and may have let go of the module since.
        return dist.is_initialized() and self._trainer.state.fn == TrainerFn.FITTING

    @property
    def _inside(self) -> Any:
        """The process group of this replica's ranks."""
        assert self._module.device_mesh is not None
        return self._module.device_mesh.get_group("data_parallel")

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Training: the whole set in an order of its own for every replica, or a shard. Evaluation: a shard."""
        own = self._trainer.training and self.options.data != "shard"
        if has_plan(self._module):
            return same_in_replica(self.grid, own=own)
        return own_order(self.grid) if own else super().distributed_sampler_kwargs

    def process_dataloader(self, dataloader: object) -> object:
        """Let training loaders of different lengths end with the shortest."""
        if self._trainer.training and self.world_size > 1:
            return even_end(dataloader, self._trainer.limit_train_batches)
        return dataloader

    @property
    def _alone(self) -> bool:
        """Whether nothing may be asked of other replicas: from a training batch's start to its callbacks' end."""
        return self._moment != Moment.BETWEEN and self._trainer.training and self.grid.replicas > 1

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce over all ranks; in a training batch over this replica's."""
        if self._alone and group in (None, dist.group.WORLD):
            if self.grid.data_parallel == 1:
                return tensor
            group = self._inside
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Gather from all ranks; in a training batch from this replica's."""
        if self._alone and group in (None, dist.group.WORLD):
            if self.grid.data_parallel == 1:
                return tensor
            group = self._inside
        return super().all_gather(tensor, group, sync_grads)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s object; in a training step that of this replica's rank at position ``src``."""
        if self._alone and self._moment == Moment.STEP:
            if self.grid.data_parallel == 1:
                return obj
            src = self.grid.replica * self.grid.data_parallel + src % self.grid.data_parallel
            objects = [obj]
            dist.broadcast_object_list(objects, src, group=self._inside)
            return objects[0]
        return super().broadcast(obj, src)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Agree on a decision with all ranks, whenever it is: to save, say."""
        before, self._moment = self._moment, Moment.BETWEEN
        try:
            return super().reduce_boolean_decision(decision, all)
        finally:
            self._moment = before
