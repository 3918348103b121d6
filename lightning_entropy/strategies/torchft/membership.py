"""Replicas that are jobs of their own, which may die, come back and join."""

from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_entropy.strategies.checkpoint import KEY
from lightning_entropy.strategies.lightning_internals import restore_from, timeout
from lightning_entropy.strategies.options import Grid, ReplicaOptions
from lightning_entropy.strategies.replica import ReplicaLoops
from lightning_entropy.strategies.save import Save
from lightning_entropy.strategies.torchft.assembly import Assembly
from lightning_entropy.strategies.torchft.delegation import Delegation
from lightning_entropy.strategies.torchft.internals import check_installed
from lightning_entropy.strategies.torchft.join import PEER, join
from lightning_entropy.strategies.torchft.lighthouse import lighthouse_address
from lightning_entropy.strategies.torchft.status import report
from lightning_entropy.strategies.watched_ddp import WatchedDDPStrategy

SILENCE = timedelta(seconds=60)  # after which a peer that is alive and does not answer is left behind


class TorchftMembership:
    """A :class:`Membership` of whoever is there: one that comes takes the state of one that is training.

    A checkpoint is of the consensus, and one replica writes it: the first that is there.

    Args:
        options: of the replicas.

    Raises:
        MisconfigurationException: torchft is not installed.
    """

    own_jobs = meets_first = True
    defaults: Mapping[str, Any] = {"timeout": SILENCE}

    def __init__(self, options: ReplicaOptions) -> None:
        check_installed()
        self._min_replicas = options.min_replicas
        self.assembly: Assembly | Delegation | None = None
        self.given: dict[str, Any] | None = None

    @property
    def wants_state(self) -> bool:
        """Whether a replica that has come waits for this one's state."""
        return self.assembly is not None and self.assembly.wants_state

    def prepare(self, strategy: WatchedDDPStrategy, grid: Grid) -> None:
        """Warn of checkpoints that would be apart; nobody is met yet, as the others wait for all that they know of."""
        assert strategy.lightning_module is not None
        trainer = strategy.lightning_module.trainer
        folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if trainer.loggers and None in folders:
            rank_zero_warn(
                "ModelCheckpoint must have a dirpath that all replicas share where they come and go, got None: each "
                "job's logger has a folder of its own, so that ckpt_path='last' of one does not find another's"
            )

    def join(self, strategy: WatchedDDPStrategy, grid: Grid) -> dict[str, Any] | None:
        """Meet the other replicas, and take the state of one that is training.

        Raises:
            MisconfigurationException: the environment does not have the lighthouse's address.
        """
        module, limit, lighthouse = strategy.lightning_module, timeout(strategy), lighthouse_address()
        assert module is not None and limit is not None
        trainer = module.trainer

        def check() -> None:
            """End a wait for other replicas, who may never come, when this job is told to end."""
            assert self.assembly is not None
            if any(self.assembly.agree([trainer.received_sigterm])):
                raise SIGTERMException

        alone = grid.world_size == 1
        assembly: Assembly | None = None
        if grid.rank == 0:
            assembly = Assembly(
                grid.replica,
                lighthouse,
                min_replicas=self._min_replicas,
                timeout=limit,
                check=check if alone else lambda: None,
            )
        self.assembly = assembly
        if not alone:
            self.assembly = Delegation(assembly, check=check, meeting=strategy.meeting, timeout=limit)
        assert self.assembly is not None
        state = join(self.assembly, module)
        self.given = None
        if state is None:
            return None
        self.given = state["checkpoint"]
        restore_from(trainer, state["checkpoint"])
        if grid.rank == 0:
            print(f"replica {grid.replica} joins at step {state['checkpoint']['global_step']}", flush=True)
        position: dict[str, Any] = state["position"]
        return position

    def begin(self, step: int) -> None:
        """Check that the ranks of this replica have found the same checkpoint.

        Raises:
            MisconfigurationException: they have not.
        """
        self.given = None
        if isinstance(self.assembly, Delegation):
            self.assembly.check_start(step)

    def give_state(self, loops: ReplicaLoops | None, trainer: Trainer, *, now: bool = True) -> None:
        """Let the Trainer save to a replica that has come, if one has."""
        if self.assembly is not None and loops is not None and self.assembly.asks() and now:
            loops.receive()
            trainer.save_checkpoint(PEER)

    def stepped(self, loops: ReplicaLoops, grid: Grid, step: int) -> None:
        """Report to whoever has started this job."""
        if self.assembly is not None and grid.rank == 0:
            report(step, loops.metrics())

    def writes(self, grid: Grid) -> bool:
        """Whether this is the first process of the first replica that is there."""
        there = [0] if self.assembly is None else self.assembly.present
        return grid.rank == 0 and grid.replica == min(there)

    def save(self, save: Save, grid: Grid, state: Mapping[str, Any]) -> None:
        """Write a checkpoint that any number of replicas can go on from, or give it to the one that waits for it."""
        if self.assembly is not None and save.path == PEER:
            self.assembly.give_state({"checkpoint": save.content, "position": ReplicaLoops.position(state)})
        elif self.writes(grid):
            info = {"replicas": 0, "token": "", "counters": ReplicaLoops.counters(state)}
            # One that was late may write yet what the next one, the first that is there, has begun to write.
            save.write({KEY: info}, writer=str(grid.replica))

    def load(
        self, checkpoint: dict[str, Any], path: Any, module: LightningModule, grid: Grid, weights_only: bool | None
    ) -> dict[str, Any] | None:
        """Go on from the consensus, with the outer step that it was saved at."""
        info = checkpoint.pop(KEY, None)
        return None if info is None else {"counters": info["counters"]}

    def remove(self, io: CheckpointIO, path: Any) -> None:
        """Remove the file, unless another replica, which was the first before, has removed it."""
        with suppress(FileNotFoundError):
            io.remove_checkpoint(path)

    def leave(self) -> None:
        """Leave the others, who go on."""
        if self.assembly is not None:
            self.assembly.close()
            self.assembly = self.given = None
