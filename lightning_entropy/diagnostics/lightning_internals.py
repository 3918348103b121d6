"""The private names of Lightning that the diagnostics need, in one place. Checked against lightning 2.6.4 to 2.6.6.

``tests/diagnostics/test_lightning_internals.py`` fails when one of them changes.
"""

from lightning.pytorch import Trainer


def logger_step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs an epoch's end: of its last batch, whatever the optimizers."""
    return max(trainer.fit_loop.epoch_loop._batches_that_stepped - 1, 0)
