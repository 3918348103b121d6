from pathlib import Path

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_entropy.diagnostics.module_copy import ModuleCopy
from tests.diagnostics import tiny

pytestmark = tiny.LIGHTNING_ADVICE


def test_a_copy_does_not_take_the_trainer_along(tmp_path: Path) -> None:
    """Whose loaders, loggers and processes a copy would double."""
    module = tiny.TinyModule()
    trainer = pl.Trainer(
        fast_dev_run=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False
    )
    trainer.fit(module, datamodule=tiny.TinyData())
    assert module.trainer is trainer
    copied = ModuleCopy(nn.Sequential(module)).module
    with pytest.raises(RuntimeError, match="not attached"):
        copied[0].trainer  # type: ignore[index]  # noqa: B018
    assert module.trainer is trainer
