"""Where a Trainer stands: how long it trains, and whether a batch was the last."""

import math
from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_entropy.methods.pull import Pull, share_of
from lightning_entropy.methods.relaxation import Relaxation


def of_this_training(relaxation: Relaxation, trainer: Trainer) -> Relaxation:
    """Return the method with its shares of the training as outer steps.

    Args:
        relaxation: the method.
        trainer: in ``on_train_start``.

    Raises:
        MisconfigurationException: it has some, and how many steps each optimizer takes is not known.
    """
    name = relaxation.share
    if name is None:
        return relaxation
    got = f"got a share of the training in {getattr(relaxation, name)!r}"
    if not trainer.lightning_module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} must count outer steps in manual optimization, where the number of each optimizer's steps is not "
            f"known, {got}"
        )
    steps = _optimizer_steps(trainer)
    if math.isinf(steps):
        raise MisconfigurationException(
            f"{name} must count outer steps without max_steps or max_epochs, as the training has no end, {got}"
        )
    return relaxation.over(steps)


def _optimizer_steps(trainer: Trainer) -> float:
    """Return how many steps an optimizer takes; inf where that is not known, for which Lightning may have -1."""
    steps = trainer.estimated_stepping_batches
    return steps if steps >= 0 else math.inf


PINNED = 0.95  # of a loop's path taken back, above which y hardly leaves x


def warn_if_pinned(relaxation: Relaxation, optimizers: Sequence[Optimizer]) -> None:
    """Warn of a gamma with which y hardly leaves x: usually a time from a paper, where a stiffness is asked for.

    Args:
        relaxation: the method; a :class:`Pull` says its share itself.
        optimizers: whose learning rates count, those that they begin with.
    """
    if not (relaxation.has_anchor and relaxation.reset) or relaxation.coupled or isinstance(relaxation.gamma, Pull):
        return
    gamma = relaxation.at(0).gamma
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    lr = max((float(group.get("initial_lr", group.get("lr", 0.0))) for group in groups), default=0.0)
    if lr * gamma <= 0:
        return
    share = share_of(lr * gamma, relaxation.inner_steps)
    # Above k = 1, y is never as far from x as one update. In a long loop a weak spring has a large share, too.
    if share > PINNED and lr * gamma > 1:
        rank_zero_warn(
            f"gamma = {gamma:g} at a learning rate of {lr:g} is a spring that takes back {share:.1%} of a loop's path, "
            "so the weights hardly move. gamma is a stiffness here, 1/gamma of Deep Relaxation and Parle; "
            "gamma=Pull(0.5) takes back half",
            stacklevel=2,
        )


def warn_if_short(owner: str, relaxation: Relaxation, trainer: Trainer) -> None:
    """Warn of a loop that is longer than the training.

    Args:
        owner: class of the callback or strategy.
        relaxation: the method; one that streams moves x within a loop.
        trainer: in ``on_train_start``. In manual optimization the number of steps is not known.
    """
    if not relaxation.has_anchor or relaxation.streams or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if not trainer.lightning_module.automatic_optimization:
        return
    steps = _optimizer_steps(trainer)
    if steps < relaxation.inner_steps:
        rank_zero_warn(
            f"{owner}: inner_steps = {relaxation.inner_steps} is more than the {int(steps)} optimizer steps of this "
            "training: no outer step comes before its end, and validations until then see the initial weights. Give "
            "fewer inner_steps, or train longer",
            stacklevel=2,
        )


def training_is_complete(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the batch that has ended is the last of the fit, as far as that is known before a validation.

    Args:
        trainer: in ``on_train_batch_end``.
        batch_idx: of the batch.
    """
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    epochs = trainer.max_epochs
    last_batch = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
    return last_batch and epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs
