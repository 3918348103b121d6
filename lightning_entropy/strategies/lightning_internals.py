"""Every private name of Lightning and torch that the strategies use, one function each.

Checked against lightning 2.6.6 and torch 2.14.1; ``tests/strategies/test_lightning_internals.py`` fails when one of
them changes. No private method of a parent class is overridden.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from torch.distributed.tensor import DTensor
from torch.nn import Module

AnyDDPStrategy = DDPStrategy | FabricDDPStrategy


def backend(strategy: AnyDDPStrategy) -> str:
    """Return the process group's backend, and choose gloo if ranks share a CUDA device: nccl refuses that.

    ``DDPStrategy`` resolves its default in ``_get_process_group_backend`` when the process group is opened, from
    ``_process_group_backend``, which only the constructor sets; the devices become known in between.
    """
    devices = strategy.parallel_devices or []
    shared = strategy.root_device.type == "cuda" and len(set(devices)) < len(devices)
    if shared and strategy.process_group_backend is None:
        strategy._process_group_backend = "gloo"
    return strategy._get_process_group_backend()


def timeout(strategy: AnyDDPStrategy) -> timedelta | None:
    """Return the process group's timeout: ``DDPStrategy`` keeps its argument in ``_timeout`` alone."""
    return strategy._timeout


def wrap_in_group(strategy: AnyDDPStrategy, group: dist.ProcessGroup) -> None:
    """Let ``DistributedDataParallel`` share gradients in one process group rather than in the whole world.

    ``DDPStrategy`` keeps DDP's arguments in ``_ddp_kwargs``; groups exist only after its constructor has run.
    """
    strategy._ddp_kwargs = {**strategy._ddp_kwargs, "process_group": group}


@contextmanager
def shards_not_sent(module: Module) -> Iterator[None]:
    """Keep Lightning from sending rank 0's shards to all ranks, which are other ranks' shards, where it does not train.

    ``DDPStrategy.setup`` sends what the module's ``_ddp_params_and_buffers_to_ignore``, which is torch's, leaves.
    """
    before = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    shards = [name for name, p in module.named_parameters() if isinstance(p, DTensor)]
    module._ddp_params_and_buffers_to_ignore = [*before, *shards]  # type: ignore[assignment]
    try:
        yield
    finally:
        if before:
            module._ddp_params_and_buffers_to_ignore = before  # type: ignore[assignment]
        else:
            del module._ddp_params_and_buffers_to_ignore


def without_gradient_sync(strategy: FabricDDPStrategy) -> None:
    """Make ``Fabric.no_backward_sync`` accept a module that is not wrapped in DDP.

    Fabric asks ``_backward_sync_control`` to block the synchronization; DDP's raises for any other module.
    """
    strategy._backward_sync_control = None  # type: ignore[assignment]


def converted(
    strategy: FabricDDPStrategy, state: dict[str, Any], filter: Mapping[str, Callable[[str, Any], bool]] | None
) -> dict[str, Any]:
    """Return what ``Fabric.save`` writes for ``state``: state dicts of modules and optimizers, filtered.

    ``Strategy.save_checkpoint`` does this in ``_convert_stateful_objects_in_state`` and writes the result at once.
    """
    return strategy._convert_stateful_objects_in_state(state, filter=dict(filter or {}))


class GroupSyncBatchNorm(TorchSyncBatchNorm):
    """SyncBatchNorm among the ranks of one process group."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def apply(self, model: Module) -> Module:
        """Convert every BatchNorm layer."""
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, self._group)


def confine_sync_batchnorm(strategy: DDPStrategy, group: dist.ProcessGroup | None) -> None:
    """Confine ``Trainer(sync_batchnorm=True)`` to one process group; None: leave BatchNorm as it is.

    The Trainer puts its ``LayerSync`` into the strategy's ``_layer_sync``, which ``DDPStrategy.setup`` applies.
    """
    if strategy._layer_sync:
        strategy._layer_sync = None if group is None else GroupSyncBatchNorm(group)


def start_method(strategy: DDPStrategy) -> str:
    """Return how processes are started, where none were from outside: ``DDPStrategy`` keeps it in ``_start_method``."""
    return strategy._start_method


def set_device_mesh(module: LightningModule, mesh: dist.DeviceMesh) -> None:
    """Set what ``LightningModule.device_mesh`` returns, as Lightning's own strategies do."""
    module._device_mesh = mesh


def restore_from(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let the Trainer restore everything from a checkpoint that is no file, as ``fit(ckpt_path=...)`` would.

    The Trainer's checkpoint connector keeps what it has read in ``_loaded_checkpoint`` until all is restored, and reads
    nothing where there is no path. To be called in ``Strategy.setup`` with ``restore_checkpoint_after_setup``.
    """
    trainer._checkpoint_connector._loaded_checkpoint = checkpoint


def number_process(number: int) -> None:
    """Set the rank by which a process knows whether it prints and logs: ``rank_zero_only.rank``.

    ``DDPStrategy.set_world_ranks`` sets both names, each of which is an attribute of a function.
    """
    rank_zero_only.rank = utils_rank_zero_only.rank = number  # type: ignore[attr-defined]


def put_first(trainer: Trainer, callback: Callback) -> None:
    """Make a callback the first to be called; one of the same type that is there already is replaced.

    A Trainer calls its ``callbacks`` in their order. The list is an attribute without an underscore, but neither
    documented nor declared by the class.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others = [other for other in callbacks if type(other) is not type(callback)]
    trainer.callbacks = [callback, *others]  # type: ignore[attr-defined]


def put_last(trainer: Trainer, callback: Callback) -> None:
    """Make a callback the last to be called; see :func:`put_first`."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others = [other for other in callbacks if type(other) is not type(callback)]
    trainer.callbacks = [*others, callback]  # type: ignore[attr-defined]


def free_batches(trainer: Trainer) -> Callable[[], None]:
    """Take out the broadcast by which Lightning ties all ranks before every training batch; return what puts it back.

    ``_TrainingEpochLoop.advance`` calls ``_broadcast_sigterm_tensor`` of its own instance, to tell all ranks of a
    SIGTERM on rank 0.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    assert callable(loop._broadcast_sigterm_tensor)
    loop._broadcast_sigterm_tensor = lambda: None

    def undo() -> None:
        del loop._broadcast_sigterm_tensor

    return undo


def ask_every_epoch(timer: Timer) -> Callable[[], None]:
    """Let a ``Timer`` broadcast its decision at the end of an epoch rather than every batch; return what undoes it.

    The ``interval`` of its constructor is kept in ``_interval``.
    """
    interval, timer._interval = timer._interval, "epoch"

    def undo() -> None:
        timer._interval = interval

    return undo


def asks_every_batch(callback: Callback) -> bool:
    """Whether a ``ModelCheckpoint`` asks all ranks every batch if its ``train_time_interval`` has passed."""
    return isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None


def handlers_of_others(handler: Any) -> list[Callable[[int, FrameType | None], Any]]:
    """Return the handlers of a signal that are not Lightning's, of the one that the Trainer has installed.

    ``_SignalConnector`` puts its own methods and whatever was installed before into a ``_HandlersCompose``, whose
    ``signal_handlers`` they are. Python's own handler of SIGINT raises, and is left out.
    """
    handlers = getattr(handler, "signal_handlers", [handler])
    ours = ("lightning.pytorch", "pytorch_lightning")
    return [
        h
        for h in handlers
        if callable(h)
        and h is not signal.default_int_handler
        and not (getattr(h, "__module__", "") or "").startswith(ours)
    ]


def replace_message(exception: BaseException, message: str) -> None:
    """Change the message of an exception that is already on its way.

    ``Strategy.on_exception`` cannot raise another one (the Trainer would not be torn down), and notes need Python 3.11
    and are not part of ``str(exception)``. Lightning rewrites ``args`` in the same hook.
    """
    exception.args = (message,)


def reset_method(module: Module) -> Callable[[], Any] | None:
    """Return the method that draws a module's own parameters anew, if it has one.

    ``torch.nn.MultiheadAttention`` and ``torch.nn.Transformer`` call it ``_reset_parameters``.
    """
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return reset if callable(reset) else None
