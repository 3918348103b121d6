"""Which replicas train together: those of one job, from its start to its end, or whoever is there."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer

from lightning_entropy.strategies.options import Grid, ReplicaOptions
from lightning_entropy.strategies.replica import ReplicaLoops
from lightning_entropy.strategies.save import Save
from lightning_entropy.strategies.static_membership import StaticMembership
from lightning_entropy.strategies.torchft.assembly import Assembly
from lightning_entropy.strategies.torchft.delegation import Delegation
from lightning_entropy.strategies.torchft.membership import TorchftMembership
from lightning_entropy.strategies.watched_ddp import WatchedDDPStrategy


class Membership(Protocol):
    """What follows, at the moments of a training, from who its replicas are.

    A strategy is copied to the processes that it starts, so what belongs to one process begins with :meth:`prepare`.
    """

    @property
    def own_jobs(self) -> bool:
        """Whether every replica is a job of its own."""
        ...

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Arguments of Lightning's ``DDPStrategy``, where the user gives none."""
        ...

    @property
    def meets_first(self) -> bool:
        """Whether other replicas, whose state may be newer, are met before a checkpoint is loaded."""
        ...

    @property
    def assembly(self) -> Assembly | Delegation | None:
        """Where the replicas of a fit meet; None: they are there all the time."""
        ...

    @property
    def wants_state(self) -> bool:
        """Whether one waits for this one's state: it must not be waited for then, as it would be in a meeting."""
        ...

    @property
    def given(self) -> dict[str, Any] | None:
        """The checkpoint that another replica has given this one to begin with, until it has begun."""
        ...

    def prepare(self, strategy: WatchedDDPStrategy, grid: Grid) -> None:
        """Make ready for a fit, in a process that takes part in it. A collective of the job."""
        ...

    def join(self, strategy: WatchedDDPStrategy, grid: Grid) -> dict[str, Any] | None:
        """Meet the others, if they are to be met; return the position of one that is training, and None if none is."""
        ...

    def begin(self, step: int) -> None:
        """Begin to train, with everything restored: at a step of the Trainer."""
        ...

    def give_state(self, loops: ReplicaLoops | None, trainer: Trainer, *, now: bool = True) -> None:
        """Give a replica that has come what ``fit(ckpt_path=...)`` would load.

        Args:
            loops: of this replica; None: it has no state.
            trainer: makes the checkpoint.
            now: False: only learn whether one waits for it.
        """
        ...

    def stepped(self, loops: ReplicaLoops, grid: Grid, step: int) -> None:
        """Say outside of the job, where somebody listens, that an outer step has been taken, as the step-th step."""
        ...

    def writes(self, grid: Grid) -> bool:
        """Whether this process writes checkpoints, and removes them."""
        ...

    def save(self, save: Save, grid: Grid, state: Mapping[str, Any]) -> None:
        """Save a checkpoint with a replica's own state. A collective of the job."""
        ...

    def load(
        self, checkpoint: dict[str, Any], path: Any, module: LightningModule, grid: Grid, weights_only: bool | None
    ) -> dict[str, Any] | None:
        """Return what a replica goes on from, of a checkpoint that is being loaded; None: of its weights alone."""
        ...

    def remove(self, io: CheckpointIO, path: Any) -> None:
        """Remove a checkpoint."""
        ...

    def leave(self) -> None:
        """End what has begun with :meth:`prepare`."""
        ...


MEMBERSHIPS: dict[str, Callable[[ReplicaOptions], Membership]] = {
    "static": StaticMembership,
    "torchft": TorchftMembership,
}


def members(options: ReplicaOptions) -> Membership:
    """Return the membership that the options name."""
    return MEMBERSHIPS[options.membership](options)
