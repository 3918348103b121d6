"""Replicas that are one job's processes, from its start to its end."""

import os
from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_entropy.strategies import checkpoint as checkpoints
from lightning_entropy.strategies import replica_files
from lightning_entropy.strategies.options import Grid, ReplicaOptions
from lightning_entropy.strategies.replica import ReplicaLoops
from lightning_entropy.strategies.save import Save
from lightning_entropy.strategies.sharding import has_shards
from lightning_entropy.strategies.torchft.lighthouse import LIGHTHOUSE
from lightning_entropy.strategies.watched_ddp import WatchedDDPStrategy


class StaticMembership:
    """A :class:`Membership` of replicas that stay: every one has a file in a checkpoint, and resumes exactly.

    Args:
        options: of the replicas.
    """

    own_jobs = meets_first = wants_state = False
    defaults: Mapping[str, Any] = {}
    assembly: None = None
    given: None = None

    def __init__(self, options: ReplicaOptions) -> None:
        self._files: checkpoints.ReplicaFiles | None = None

    def prepare(self, strategy: WatchedDDPStrategy, grid: Grid) -> None:
        """Name the run, so that its files are told from others'; say so where a lighthouse is there for nothing."""
        if LIGHTHOUSE in os.environ:
            rank_zero_warn(
                f"{LIGHTHOUSE} is set, and membership is 'static': this job meets no other. Replicas that come and go "
                f"need {type(strategy).__name__}(membership='torchft')"
            )
        self._files = checkpoints.ReplicaFiles(grid, checkpoints.new_run(strategy.broadcast), strategy.barrier)

    def join(self, strategy: WatchedDDPStrategy, grid: Grid) -> None:
        """Meet nobody: all are here."""

    def begin(self, step: int) -> None:
        """Begin, as all do that have been restored together."""

    def give_state(self, loops: ReplicaLoops | None, trainer: Trainer, *, now: bool = True) -> None:
        """Give nothing: nobody comes."""

    def stepped(self, loops: ReplicaLoops, grid: Grid, step: int) -> None:
        """Say nothing: nobody outside of the job counts its steps."""

    def writes(self, grid: Grid) -> bool:
        """Whether this is the first process."""
        return grid.rank == 0

    def save(self, save: Save, grid: Grid, state: Mapping[str, Any]) -> None:
        """Write the main file and every rank's own, so that a crash leaves the last ones whole."""
        assert self._files is not None
        self._files.save(
            save.io,
            save.content,
            save.own(state),
            {"counters": ReplicaLoops.counters(state)},
            save.path,
            save.storage_options,
            alone=save.alone,
            sharded=save.sharded,
        )

    def load(
        self, checkpoint: dict[str, Any], path: Any, module: LightningModule, grid: Grid, weights_only: bool | None
    ) -> dict[str, Any] | None:
        """Read this rank's own file, and put what it has of the Trainer's checkpoint in the place of the first's."""
        sharded, params = has_shards(module), dict(module.named_parameters())
        restored = checkpoints.load(checkpoint, path, grid, weights_only, sharded=sharded, params=params)
        checkpoint.update((restored or {}).pop("checkpoint", {}))
        return restored

    def remove(self, io: CheckpointIO, path: Any) -> None:
        """Remove the main file and the replicas' files."""
        io.remove_checkpoint(path)
        replica_files.remove(path)

    def leave(self) -> None:
        """End with the others; what is saved afterwards is of this run still."""
