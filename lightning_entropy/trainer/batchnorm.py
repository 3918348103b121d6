"""BatchNorm statistics of the weights one evaluates."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeGuard

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from lightning_entropy.methods.validation import check_integer
from lightning_entropy.trainer.lightning_internals import before_batch_transfer, without_iterator
from lightning_entropy.trainer.state_key import StateKey

NOTHING = "RefreshBatchNorm has nothing to do: no layer of this module keeps BatchNorm statistics"


class RefreshBatchNorm(Callback):
    """Re-estimate BatchNorm statistics at the weights that are evaluated, before validation and test.

    Training collects them at y, and averaged over the last steps; evaluation is at x. Every running mean and variance
    becomes the plain average over ``n_batches`` training batches at x (as ``torch.optim.swa_utils.update_bn``), with
    dropout off, as the authors of Entropy-SGD do it, and averaged over ranks. Checkpoints that follow have
    the new statistics. Training is not touched: its forward pass does not read them, and the state of every random
    generator, loader and worker is what it was; only a sampler or an iterable dataset that counts its own passes counts
    one more. Layers in evaluation mode during training, and those that the forward
    pass does not reach, keep theirs. Useful with any callback that evaluates other weights than
    it trains, such as weight averaging. One batch is worse than none; ten cost about ten forward passes per validation.

    Args:
        n_batches: training batches, int >= 1; fewer where the loader ends.
        dataloader: where they come from; None: the Trainer's training loader, else the datamodule's or the module's.
        forward: what is run on a batch, ``(module, batch) -> Any``; None: ``module(batch)``, or ``module(batch[0])``
            for a tuple or list.

    Raises:
        ValueError: ``n_batches`` below 1.
        TypeError: ``n_batches`` is not an int, or ``forward`` no callable.
        MisconfigurationException: in validation or test: no training data, or no batch in it.

    References:
        Chaudhari et al., Entropy-SGD, ICLR 2017 (code); Izmailov et al., SWA, UAI 2018, arXiv:1803.05407.
    """

    state_key = StateKey()  # type: ignore[assignment]

    def __init__(
        self,
        n_batches: int = 64,
        *,
        dataloader: Any = None,
        forward: Callable[[LightningModule, Any], Any] | None = None,
    ) -> None:
        self.n_batches = check_integer("n_batches", n_batches, 1)
        if forward is not None and not callable(forward):
            raise TypeError(f"forward must be a callable of (module, batch), got {forward!r}")
        self.dataloader = dataloader
        self.forward = forward
        self._frozen: set[str] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say before training, which may have no validation, when there will be nothing to refresh."""
        if not any(map(keeps_statistics, pl_module.modules())):
            rank_zero_warn(NOTHING)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which layers are in evaluation mode while the others train: to them their statistics are weights."""
        if batch_idx == 0 or self._frozen is None:
            self._frozen = {name for name, m in pl_module.named_modules() if keeps_statistics(m) and not m.training}

    # The epoch-start hooks: by then every callback, the module and the strategy have put the weights in place.

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refresh, unless this is the sanity check before training."""
        if not trainer.sanity_checking:
            self.refresh(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refresh."""
        self.refresh(trainer, pl_module)

    @torch.no_grad()
    def refresh(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Re-estimate the statistics of every BatchNorm layer that keeps some.

        Args:
            trainer: gives data, device and precision.
            pl_module: whose layers.

        Raises:
            MisconfigurationException: no training data, no batch in it, or none that the module takes.
        """
        frozen = self._frozen or ()
        layers = [m for name, m in pl_module.named_modules() if keeps_statistics(m) and name not in frozen]
        if not layers:
            if not frozen and trainer.state.fn != TrainerFn.FITTING:
                rank_zero_warn(NOTHING)
            return
        with isolate_rng(), _collecting(pl_module, layers):
            count = 0
            for batch in islice(_batches(self._loader(trainer, pl_module)), self.n_batches):
                batch = before_batch_transfer(pl_module, trainer.precision_plugin.convert_input(batch))
                batch = trainer.strategy.batch_to_device(batch)
                with trainer.precision_plugin.forward_context():
                    self._run(pl_module, batch, first=count == 0)
                count += 1
            if count == 0:
                raise MisconfigurationException(
                    "dataloader must have at least one batch for RefreshBatchNorm, got none"
                )
            if trainer.world_size > 1:
                _average_over_ranks(trainer, [b for layer in layers for b in (layer.running_mean, layer.running_var)])

    def _run(self, pl_module: LightningModule, batch: Any, *, first: bool) -> None:
        if self.forward is not None:
            self.forward(pl_module, batch)
            return
        pair = isinstance(batch, list | tuple)
        try:
            pl_module(batch[0] if pair else batch)
        except (NotImplementedError, TypeError, KeyError, AttributeError) as error:  # no forward, or of other inputs
            if not first:  # the module takes a batch
                raise
            name, reason = type(pl_module).__name__, f"{type(error).__name__}: {error}"
            reason = "it has no forward" if isinstance(error, NotImplementedError) else reason
            raise MisconfigurationException(
                f"RefreshBatchNorm runs {name}(batch{'[0]' if pair else ''}), a batch being a {type(batch).__name__}, "
                f"which has failed ({reason}): say what to run, as in "
                "RefreshBatchNorm(forward=lambda module, batch: module.net(batch['x']))"
            ) from error

    def _loader(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        if self.dataloader is not None:
            return self.dataloader
        if trainer.train_dataloader is not None:
            return trainer.train_dataloader
        datamodule = getattr(trainer, "datamodule", None)
        for source in (datamodule, pl_module):
            if source is not None and is_overridden("train_dataloader", source):
                return source.train_dataloader()
        raise MisconfigurationException(
            "RefreshBatchNorm needs training batches, and this Trainer has none: give it dataloader="
        )


def keeps_statistics(module: Module) -> TypeGuard[_BatchNorm]:
    """Return whether a module is a BatchNorm with running statistics."""
    return isinstance(module, _BatchNorm) and module.track_running_stats


@contextmanager
def _collecting(module: LightningModule, layers: list[_BatchNorm]) -> Iterator[None]:
    """Put the layers, and they alone, in the mode that collects a plain average; undo it all on an exception."""
    modes = [(m, m.training) for m in module.modules()]
    kept = [(layer, layer.momentum, [b.clone() for b in layer.buffers(recurse=False)]) for layer in layers]
    collected = False
    try:
        module.eval()
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None
        yield
        collected = True
    finally:
        # Which of them the forward pass has reached: read once for all, as the device is waited for.
        counts = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
        reached = torch.stack([n.to(counts[0].device) for n in counts]).tolist() if collected else [0] * len(kept)
        for (layer, momentum, buffers), batches in zip(kept, reached, strict=True):
            layer.momentum = momentum
            if batches:
                continue
            for b, saved in zip(layer.buffers(recurse=False), buffers, strict=True):
                b.copy_(saved)
        for m, training in modes:
            m.training = training


def _batches(loader: Any) -> Iterator[Any]:
    """Iterate over a loader, or a collection of some, without disturbing an iteration that is under way."""
    combined = CombinedLoader(loader, "min_size")
    states = [(g, g.get_state()) for g in {g for each in combined.flattened for g in _generators(each)}]
    places = [(each, copy.deepcopy(each.state_dict())) for each in combined.flattened if _keeps_its_place(each)]
    combined.flattened = [_apart(each) for each in combined.flattened]
    try:
        for batch, _, _ in combined:
            yield batch
    finally:
        combined.reset()
        for g, state in states:
            g.set_state(state)
        for each, place in places:
            each.load_state_dict(place)


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """Yield the random generators that iterating over a loader advances."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for owner in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator


def _keeps_its_place(loader: Any) -> bool:
    """Whether the loader stores its own position, so that iterating it again would disturb an iteration in progress."""
    return not isinstance(loader, DataLoader) and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _apart(loader: Any) -> Any:
    """Copy a loader with persistent workers: they would restart the iterator that training is using."""
    return without_iterator(loader) if isinstance(loader, DataLoader) else loader


def _average_over_ranks(trainer: Trainer, buffers: list[Tensor | None]) -> None:
    """Replace every buffer by its mean over the ranks, in one reduction."""
    known = [b for b in buffers if b is not None]
    mean = trainer.strategy.reduce(torch.cat([b.flatten() for b in known]), reduce_op="mean")
    for b, part in zip(known, mean.split([b.numel() for b in known]), strict=True):
        b.copy_(part.view_as(b))
