"""A DDP strategy for the Trainer whose errors name the rank that died, and that does not wait for it."""

from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from lightning_entropy.strategies.lightning_internals import backend, replace_message, timeout
from lightning_entropy.strategies.liveness import Heartbeat, meeting, watch
from lightning_entropy.strategies.options import Grid
from lightning_entropy.strategies.rendezvous import join_after_restart


class WatchedDDPStrategy(DDPStrategy):
    """DDP with a heartbeat: an error of a collective names the rank that is gone.

    After an exception collectives do nothing, as the other ranks may not take part in them.
    """

    _heartbeat: Heartbeat | None = None

    def setup_distributed(self) -> None:
        """Join the process group, also after torchrun has started the ranks again."""
        assert self.cluster_environment is not None
        join_after_restart(self.cluster_environment, backend(self), self.root_device, timeout(self))
        super().setup_distributed()

    def _watch(self, grid: Grid) -> None:
        """Start the heartbeat. A collective."""
        assert self.cluster_environment is not None
        if self._heartbeat is None:
            self._heartbeat = watch(grid, self.cluster_environment)

    def _named(self, error: RuntimeError) -> RuntimeError:
        """Return an error that names the ranks that are gone; the same error if none is."""
        return error if self._heartbeat is None else self._heartbeat.named(error)

    @property
    def _leaving(self) -> bool:
        """Whether an exception has been raised, so that the other ranks may not take part in a collective."""
        if self.lightning_module is None:
            return False
        try:
            return self.lightning_module.trainer.interrupted
        except RuntimeError:  # the module is not attached yet
            return False

    def failed(self, exception: BaseException) -> None:
        """Tell the other ranks why this one leaves, unless it is because of one that is gone."""
        gone = isinstance(exception, RuntimeError) and self._named(exception) is not exception
        if self._heartbeat is not None and not gone:
            self._heartbeat.leave(exception)

    def on_exception(self, exception: BaseException) -> None:
        """Name the rank that is gone, if that is what happened."""
        super().on_exception(exception)
        if isinstance(exception, RuntimeError):
            named = self._named(exception)
            if named is not exception:
                replace_message(exception, str(named))

    def teardown(self) -> None:
        """Stop the heartbeat."""
        self.end_heartbeat()
        super().teardown()

    def end_heartbeat(self) -> None:
        """Let the others know that this rank has come to its end. May be called twice.

        Before its process groups are closed: that may keep all threads of the process waiting, and a rank that is
        done would be taken for one that has stopped answering.
        """
        if self._heartbeat is not None:
            if self._leaving and self.is_global_zero:
                # Rank 0 may be the one that started the others and ends them: they are let write their checkpoints.
                self._heartbeat.wait_for_others()
            self._heartbeat.stop()
            self._heartbeat = None

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks."""
        if not self._leaving:
            with self.meeting("a barrier"):
                super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s object."""
        if self._leaving:
            return obj
        with self.meeting("a broadcast"):
            return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce over all ranks."""
        if self._leaving:
            return tensor
        with self.meeting("a reduction"):
            return super().reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Agree on a decision."""
        return decision if self._leaving else super().reduce_boolean_decision(decision, all)

    def meeting(self, where: str) -> AbstractContextManager[None]:
        """Wait for other ranks inside of the block; an error names the ranks that are gone."""
        return meeting(self._heartbeat, where)
