"""A replica's own state in the Trainer: what a fit goes on from, what a checkpoint has of it, what it leaves."""

import copy
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lightning_entropy.strategies.options import ReplicaOptions
from lightning_entropy.strategies.replica import ReplicaLoops
from lightning_entropy.strategies.sharding import has_shards, with_shards
from lightning_entropy.strategies.start import rng_state, set_rng_state
from lightning_entropy.trainer.resume import check_loadable, check_method


class ReplicaState:
    """The loops' state with the random one, where in an epoch it is, and of which method and parameters.

    Args:
        options: of the replicas.
        data_parallel: ranks of a replica.

    Attributes:
        resumed: a checkpoint has been loaded for this fit.
        restored: what this replica goes on from, until its loops have it; None: from the weights alone.
    """

    def __init__(self, options: ReplicaOptions, data_parallel: int = 1) -> None:
        self._options, self._data_parallel = options, data_parallel
        self.resumed = False
        self.restored: dict[str, Any] | None = None
        self._unclosed: dict[str, Any] | None = None  # before the loops were closed
        self._left: dict[str, Any] | None = None  # by the fit that has ended
        self._epoch_rng: dict[str, Any] | None = None  # of a checkpoint from an epoch's last batch, until the next one

    def _method(self) -> dict[str, Any]:
        """Return what a resumed run should have in common with this one, as plain values."""
        return {
            **self._options.relaxation.describe(),
            "data": self._options.data,
            "communication_dtype": self._options.communication_dtype,
            "data_parallel": self._data_parallel,
        }

    # At the start of a fit

    def load(self, restored: dict[str, Any] | None) -> None:
        """Take what has been read of a checkpoint."""
        self.resumed, self.restored = True, restored

    def check_optimizers(self, optimizers: Sequence[Optimizer], states: Sequence[Any]) -> None:
        """Check that optimizers can load their states of the checkpoint.

        Raises:
            MisconfigurationException: one is of another class than the checkpoint's, and cannot.
        """
        if self.restored is not None:
            check_loadable(self.restored, optimizers, states)

    def restore_rng(self) -> None:
        """Restore the random state that the optimizers were saved with."""
        if self.restored is not None and "rng" in self.restored:
            set_rng_state(self.restored["rng"])

    def restore(self, loops: ReplicaLoops, module: LightningModule) -> None:
        """Let new loops go on from what has been loaded."""
        if self.restored is None:
            return
        restored, self.restored = self.restored, None
        if has_shards(module):
            restored = with_shards(restored, dict(module.named_parameters()))
        loops.load_state_dict(restored)
        if "method" in restored:
            check_method(restored, self._method(), self._options.seed)
        if not restored.get("mid_epoch"):
            self._epoch_rng = restored.get("rng")
        elif "rng" in restored:
            # Making the loader's iterator has drawn a number, as it did at the start of the interrupted epoch.
            set_rng_state(restored["rng"])

    # In training

    def begin_batch(self, loops: ReplicaLoops) -> None:
        """Open loops again that were closed, as training goes on after all."""
        self._epoch_rng = None
        if self._unclosed is not None:
            loops.loops.resume()
            loops.load_state_dict(self._unclosed)
            self._unclosed = None

    def end_epoch(self) -> None:
        """Undo the draw of an epoch's iterator that was made again, to resume from the validation of its last batch."""
        if self._epoch_rng is not None:
            set_rng_state(self._epoch_rng)
            self._epoch_rng = None

    def close(self, loops: ReplicaLoops, module: LightningModule) -> bool:
        """Close unfinished loops, and keep the state from which a resume goes on. A collective.

        Returns:
            Whether x was shown, and is not any more.
        """
        if self._unclosed is not None or not any(loop.unfinished for loop in loops.loops.loops):
            return False
        shown = loops.loops.shown
        loops.loops.resume()
        self._unclosed = copy.deepcopy(self._of(loops, module))
        loops.close()
        return shown

    # For a checkpoint

    def now(self, loops: ReplicaLoops | None, module: LightningModule) -> dict[str, Any] | None:
        """Return what is to be saved; None: nothing has been trained.

        Args:
            loops: of the fit that goes on; None: it has ended.
            module: whose parameters.
        """
        return self._left if loops is None else self._of(loops, module)

    def leave(self, loops: ReplicaLoops, module: LightningModule) -> None:
        """Keep the state of loops that are going to be detached."""
        self._left = self._of(loops, module)

    def _of(self, loops: ReplicaLoops, module: LightningModule) -> dict[str, Any]:
        names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        state = loops.state_dict() if self._unclosed is None else self._unclosed
        return {
            **state,
            "rng": rng_state(),
            "mid_epoch": not module.trainer.is_last_batch,
            "method": self._method(),
            "optimizers": [type(loop.optimizer).__name__ for loop in loops.loops.loops],
            "parameters": [[names.get(p, "") for p in loop.params] for loop in loops.loops.loops],
        }
