"""What both strategies take, written once: arguments, their checks, the grid of replicas, seeds, registered names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from lightning_entropy.engine.outer_rules import OuterFactory
from lightning_entropy.methods import presets
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.strategies.compression import FORMATS, Format

SEED_STRIDE = 1_000_003  # between the seeds of two replicas: more epochs than anyone trains


class Grid(NamedTuple):
    """Where a process stands: R replicas of D ranks, rank = replica * D + position.

    Example:
        >>> grid = Grid(rank=5, world_size=8, replicas=4)
        >>> grid.data_parallel, grid.replica, grid.position
        (2, 2, 1)
    """

    rank: int
    world_size: int
    replicas: int

    @property
    def data_parallel(self) -> int:
        """D, ranks of one replica."""
        return self.world_size // self.replicas

    @property
    def replica(self) -> int:
        """The replica of this rank, in [0, R)."""
        return self.rank // self.data_parallel

    @property
    def position(self) -> int:
        """Its place in the replica, in [0, D)."""
        return self.rank % self.data_parallel

    @property
    def file(self) -> str:
        """The name of this rank's file in a checkpoint, without its ending."""
        return f"{self.replica}" if self.position == 0 else f"{self.replica}-{self.position}"

    def check(self, error: type[Exception]) -> None:
        """Raise ``error`` if the replicas do not divide the processes."""
        if self.world_size % self.replicas:
            raise error(f"replicas must divide the number of processes ({self.world_size}), got {self.replicas}")

    def seed(self, common: int) -> int:
        """Return this replica's seed, the same on its ranks, from the seed that all ranks have in common.

        Example:
            >>> Grid(0, 4, 2).seed(7), Grid(1, 4, 2).seed(7), Grid(2, 4, 2).seed(7)
            (7, 7, 1000010)
        """
        return common + self.replica * SEED_STRIDE


@dataclass(frozen=True)
class ReplicaOptions:
    """The arguments of our own that both strategies take; their meaning is documented at ElasticEntropyStrategy.

    The defaults stand in the strategies' signatures, which is where users, editors and command lines look for them.

    Raises:
        ValueError: an argument outside its range, or a relaxation that perturbs instead of looping.
        TypeError: ``relaxation`` is not one.
    """

    relaxation: Relaxation
    replicas: int | Literal["auto"]
    data: Literal["all", "shard"]
    independent_init: bool
    outer: OuterFactory | None
    seed: int | None
    communication_dtype: Format
    overlap: bool

    def __post_init__(self) -> None:
        if not isinstance(self.relaxation, Relaxation):
            raise TypeError(f"relaxation must be a Relaxation, got {type(self.relaxation).__name__}")
        if not self.relaxation.has_anchor:
            raise ValueError(
                "relaxation must have perturb=False for replicas, got True: it has no anchors to pull together"
            )
        replicas = self.replicas
        if replicas != "auto" and (isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1):
            raise ValueError(f"replicas must be 'auto' or an int >= 1, got {replicas!r}")
        if self.data not in ("all", "shard"):
            raise ValueError(f"data must be 'all' or 'shard', got {self.data!r}")
        if self.communication_dtype not in FORMATS:
            raise ValueError(f"communication_dtype must be one of {FORMATS}, got {self.communication_dtype!r}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")

    def grid(self, rank: int, world_size: int) -> Grid:
        """Return where a rank stands; ``"auto"`` makes every process a replica."""
        return Grid(rank, world_size, world_size if self.replicas == "auto" else self.replicas)

    def common_seed(self, broadcast: Callable[[int], int]) -> int:
        """Return the seed that all ranks have in common. A collective.

        Args:
            broadcast: returns rank 0's value on all ranks.
        """
        return int(broadcast(torch.initial_seed() if self.seed is None else self.seed))


def register(strategy: type, registry: Any) -> None:
    """Register a strategy as ``elastic_entropy`` and ``elastic_sgd``, with ``_spawn``, ``_fork`` and ``_notebook``.

    A name that is there is replaced, so that a module may be imported twice.

    Args:
        strategy: the class.
        registry: Lightning's, of the Trainer's strategies or of Fabric's.
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
