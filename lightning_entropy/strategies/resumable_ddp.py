"""A DDP strategy of replicas whose checkpoints have the consensus, and each replica's own state to go on from."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_entropy.strategies.options import ReplicaOptions
from lightning_entropy.strategies.replica import ReplicaLoops
from lightning_entropy.strategies.replica_ddp import ReplicaDDPStrategy
from lightning_entropy.strategies.replica_state import ReplicaState
from lightning_entropy.strategies.save import Save
from lightning_entropy.strategies.sharding import gathered, has_shards, module_state, optimizer_state
from lightning_entropy.trainer.resume import loop_of_callback, warn_of_another


class ResumableDDPStrategy(ReplicaDDPStrategy):
    """Saves and loads; what a replica has of its own, and who writes, is asked of the membership.

    Args:
        options: of the replicas.
        **kwargs: of Lightning's ``DDPStrategy``.
    """

    def __init__(self, options: ReplicaOptions, **kwargs: Any) -> None:
        super().__init__(options, **kwargs)
        self._loops: ReplicaLoops | None = None  # of the fit that goes on
        self._state = ReplicaState(options)  # of the last fit

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the main file and what is each replica's own, so that a crash leaves the last ones whole."""
        if self._leaving and not dist.is_initialized():
            return  # the parent of spawned processes: they have saved what they trained, and it has trained nothing
        state, sharded = self._state.now(self._loops, self._module), has_shards(self._module)
        # The process that has started others for the fit has a module without a Trainer.
        alone = (sharded or state is not None) and self._trainer.interrupted
        parts = checkpoint
        if sharded and alone:
            rank_zero_warn(f"{filepath} is not written after an exception: its weights are shards of several ranks")
            return
        if sharded and self.grid.replica == 0:
            checkpoint = gathered(checkpoint, keep=self.is_global_zero)
        save = Save(self.checkpoint_io, checkpoint, parts, filepath, storage_options, alone, sharded)
        if state is not None and "optimizer_states" in checkpoint:
            self._members.save(save, self.grid, state)
        elif self._members.writes(self.grid):
            save.write()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the main file and, in fit, what is this replica's own; or take what another replica has given."""
        if self._members.given is not None:
            return self._members.given
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if self._fitting:
            module = self._module
            restored = self._members.load(checkpoint, checkpoint_path, module, self.grid, weights_only)
            if restored is None and (other := loop_of_callback(checkpoint)):
                warn_of_another(type(self).__name__, other)
            self._state.load(restored)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, of which the file has the whole."""
        if has_shards(self._module):
            checkpoint = {"state_dict": module_state(checkpoint["state_dict"], self._module)}
        super().load_model_state_dict(checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers, and the random state that they were saved with."""
        if has_shards(self._module):
            states = zip(checkpoint["optimizer_states"], self.optimizers, strict=False)
            checkpoint = {"optimizer_states": [optimizer_state(state, optimizer) for state, optimizer in states]}
        self._state.check_optimizers(self.optimizers, checkpoint["optimizer_states"])
        super().load_optimizer_state_dict(checkpoint)
        self._state.restore_rng()
        if self._loops is not None:  # a finder puts back what its trial has changed; the loops have not been in it
            self._state.restored = None

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove the main file and the replicas' files."""
        if self._members.writes(self.grid):
            self._members.remove(self.checkpoint_io, filepath)
