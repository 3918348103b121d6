"""Every private name of Lightning that this floor uses, one function each.

Checked against lightning 2.6.6; ``tests/trainer/test_lightning_internals.py`` fails when one of them changes.
"""

from lightning.pytorch import Trainer


def logger_step(trainer: Trainer) -> int:
    """Return the step under which Lightning's own ``self.log`` reaches the loggers: batches that ended in an update.

    With several optimizers ``Trainer.global_step`` is another number: it counts the steps of all of them.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped
