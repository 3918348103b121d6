"""What both strategies take, written once: arguments, their checks, the grid of replicas, seeds, registered names."""

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel

from lightning_entropy.engine.offload import check_offload
from lightning_entropy.engine.outer_rules import OuterFactory
from lightning_entropy.methods import presets
from lightning_entropy.methods.arguments import check_names
from lightning_entropy.methods.relaxation import Relaxation, check_relaxation
from lightning_entropy.methods.validation import check_bool
from lightning_entropy.strategies.compression import FORMATS, Format

REPLICA = "REPLICA_GROUP_ID"  # in the environment of a job that is one replica

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
    first: int = 0  # the number of the first of these replicas, where others are jobs of their own

    @property
    def data_parallel(self) -> int:
        """D, ranks of one replica."""
        return self.world_size // self.replicas

    @property
    def replica(self) -> int:
        """The replica of this rank, in [0, R) where all replicas are of this job."""
        return self.first + self.rank // self.data_parallel

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
    compile: bool = False
    offload_anchor: bool = False
    membership: Literal["static", "torchft"] = "static"
    min_replicas: int = 1

    def __post_init__(self) -> None:
        check_relaxation(self.relaxation)
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
        check_bool("compile", self.compile)
        check_offload(self.offload_anchor, self.relaxation)
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if self.membership not in ("static", "torchft"):
            raise ValueError(f"membership must be 'static' or 'torchft', got {self.membership!r}")
        if isinstance(self.min_replicas, bool) or not isinstance(self.min_replicas, int) or self.min_replicas < 1:
            raise ValueError(f"min_replicas must be an int >= 1, got {self.min_replicas!r}")
        if self.membership == "static" and self.min_replicas != 1:
            raise ValueError(f"min_replicas has no meaning with membership='static', got {self.min_replicas}")
        if self.elastic:
            self._check_elastic()

    def _check_elastic(self) -> None:
        """Refuse what needs to know how many replicas there are, or what all of them have sent before."""
        only = {"replicas": "auto", "data": "all", "independent_init": False}
        for name, value in only.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be {value!r} with membership='torchft', got {getattr(self, name)!r}")

    @property
    def elastic(self) -> bool:
        """Whether replicas are jobs of their own, which come and go."""
        return self.membership == "torchft"

    @property
    def meet(self) -> bool:
        """Whether the method ties replicas: by rho, or by a pseudo-gradient that they have in common."""
        return self.relaxation.rho != 0 or self.relaxation.elastic_target == "pseudo_gradient"

    def grid(self, rank: int, world_size: int) -> Grid:
        """Return where a rank stands; ``"auto"`` makes every process a replica, or every job where they come and go."""
        if self.elastic:
            return Grid(rank, world_size, 1, replica_number())
        return Grid(rank, world_size, world_size if self.replicas == "auto" else self.replicas)

    def describe(self, grid: Grid) -> str:
        """Say in a sentence how replicas train and what they see.

        Example:
            >>> options = ReplicaOptions(presets.parle(), "auto", "all", False, None, None, "float32", True)
            >>> options.describe(Grid(0, 2, 2))
            "2 replicas x 1 process; each sees all data, so an epoch is 2 passes over it (data='shard' makes it one)"
        """
        processes = f"{grid.data_parallel} process{'es' if grid.data_parallel > 1 else ''}"
        if self.elastic:
            return (
                f"replica {grid.replica}, a job of its own ({processes}); it sees all data, and meets the others where "
                "there are any"
            )
        if grid.replicas == 1:
            return f"1 replica x {processes}, and nothing to tie it to: ask for more devices or fewer processes each"
        who = f"{grid.replicas} replicas x {processes}"
        if not self.meet:
            who += ", which do not meet while they train (rho is 0), and whose mean is shown (parle() ties them)"
        if self.data == "shard":
            return f"{who}; each sees a different one of {grid.replicas} parts of every epoch"
        return f"{who}; each sees all data, so an epoch is {grid.replicas} passes over it (data='shard' makes it one)"

    def common_seed(self, broadcast: Callable[[int], int]) -> int:
        """Return the seed that all ranks have in common. A collective.

        Args:
            broadcast: returns rank 0's value on all ranks.
        """
        return int(broadcast(torch.initial_seed() if self.seed is None else self.seed))


class OptionAttributes:
    """The options as public attributes of a strategy; the code itself reads ``options``."""

    options: ReplicaOptions
    relaxation = property(attrgetter("options.relaxation"))
    replicas = property(attrgetter("options.replicas"))
    data = property(attrgetter("options.data"))
    independent_init = property(attrgetter("options.independent_init"))
    outer = property(attrgetter("options.outer"))
    seed = property(attrgetter("options.seed"))
    communication_dtype = property(attrgetter("options.communication_dtype"))
    overlap = property(attrgetter("options.overlap"))
    compile = property(attrgetter("options.compile"))
    offload_anchor = property(attrgetter("options.offload_anchor"))

    @property
    def state_key(self) -> str:
        """What Lightning asks every callback for: a strategy says that it is none.

        Raises:
            AttributeError: always.
        """
        name = type(self).__name__
        raise AttributeError(f"{name} is a strategy and no callback: write Trainer(strategy={name}(...))") from None


def check_arguments(strategy: type, parent: type, given: Iterable[str]) -> None:
    """Raise an error for an argument that neither a strategy, nor Lightning's, nor ``DistributedDataParallel`` has.

    Lightning's takes what it does not know for ``DistributedDataParallel``, which is not made of a replica of one rank.

    Args:
        strategy: ours.
        parent: Lightning's.
        given: names of arguments.

    Raises:
        TypeError: an argument that there is not.
    """
    signatures = [inspect.signature(kind) for kind in (strategy, parent, DistributedDataParallel)]
    names = [name for signature in signatures for name in signature.parameters]
    known = [name for name in names if name not in ("kwargs", "module")]
    check_names(strategy.__name__, given, known, [field.name for field in fields(Relaxation)])


# Under which names a strategy is registered; a hyphen is what many write first.
NAMES: dict[str, Callable[[], Relaxation]] = {
    "elastic_entropy": presets.parle,
    "elastic-entropy": presets.parle,
    "parle": presets.parle,
    "elastic_sgd": presets.elastic_sgd,
    "elastic-sgd": presets.elastic_sgd,
    "local_sgd": presets.local_sgd,
    "local-sgd": presets.local_sgd,
    "diloco": presets.diloco,
    "streaming_diloco": presets.streaming_diloco,
    "streaming-diloco": presets.streaming_diloco,
}

# Methods of one process, which are easily taken for a strategy's name, with what to write instead.
CALLBACKS = {
    "entropy_sgd": "EntropySGD()",
    "entropy-sgd": "EntropySGD()",
    "hamilton_jacobi": "HamiltonJacobi()",
    "heat": "HeatSmoothing()",
    "lookahead": "InnerOuterCallback(lookahead())",
    "smoothed_lookahead": "InnerOuterCallback(smoothed_lookahead())",
    "snoo": "InnerOuterCallback(snoo())",
}


def refuse(method: str, **_: Any) -> None:
    """Say what to write in the place of a method's name among the strategies.

    Raises:
        MisconfigurationException: always.
    """
    raise MisconfigurationException(
        f"strategy={method!r} is a method of one process and no strategy: write callbacks=[{CALLBACKS[method]}]. "
        f"Strategies with replicas are {', '.join(name for name in NAMES if '-' not in name)}"
    )


def replica_number() -> int:
    """Return the number of this job's replica.

    Raises:
        MisconfigurationException: the environment does not have it.
    """
    text = os.environ.get(REPLICA, "")
    if not text.isdecimal():
        raise MisconfigurationException(
            f"membership='torchft' needs {REPLICA}, the number of this job's replica from 0 on, in the environment, "
            f"got {text!r}: python -m lightning_entropy.launch sets it"
        )
    return int(text)


def register(strategy: type, registry: Any) -> None:
    """Register a strategy under its names, with ``_spawn``, ``_fork`` and ``_notebook`` too.

    A name that is there is replaced, so that a module may be imported twice.

    Args:
        strategy: the class.
        registry: Lightning's, of the Trainer's strategies or of Fabric's.
    """
    for name, preset in NAMES.items():
        for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            registry.register(
                name + suffix,
                strategy,
                description=f"Replicas without shared gradients ({name}), start_method={start_method!r}",
                override=True,
                relaxation=preset(),
                start_method=start_method,
            )
    for name, callback in CALLBACKS.items():
        registry.register(name, refuse, description=f"No strategy: callbacks=[{callback}]", override=True, method=name)
