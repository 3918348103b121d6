"""The plugin puts a callback of ours into every Trainer of a suite, and counts what fails with it alone."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import forked, lightning_suite
from tests.lightning_suite import CALLBACKS, main, run

# In the manner of Lightning's own.
SUITE = """
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel

QUIET = dict(accelerator="cpu", devices=1, max_epochs=2, limit_train_batches=3, limit_val_batches=1, logger=False,
             enable_progress_bar=False, enable_model_summary=False)

@pytest.mark.parametrize("kind", [BoringModel, ManualOptimBoringModel])
def test_fit_and_resume(tmp_path, kind):
    keep = ModelCheckpoint(tmp_path, save_last=True)
    Trainer(**QUIET, default_root_dir=tmp_path, callbacks=keep).fit(kind())
    trainer = Trainer(**{**QUIET, "max_epochs": 3}, default_root_dir=tmp_path, callbacks=[keep])
    trainer.fit(kind(), ckpt_path="last")
    assert trainer.global_step == 9

def test_hooks(tmp_path):
    seen = []
    call = LambdaCallback(on_train_batch_end=lambda *_: seen.append(1))
    Trainer(**QUIET, default_root_dir=tmp_path, callbacks=call).fit(BoringModel())
    assert len(seen) == 6

def test_there_is_one_of_ours():
    from lightning_entropy import InnerOuterCallback
    assert sum(isinstance(c, InnerOuterCallback) for c in Trainer(**QUIET).callbacks) == 1

def test_a_shared_parameter(tmp_path):
    class Shared(BoringModel):
        def configure_optimizers(self):
            return [super(Shared, self).configure_optimizers()[0][0] for _ in range(2)]
        def training_step(self, batch, batch_idx):
            self.optimizers()[0].step()
    model = Shared()
    model.automatic_optimization = False
    Trainer(**QUIET, default_root_dir=tmp_path).fit(model)

def test_no_callback_but_lightnings():
    assert {type(c).__module__.split(".")[0] for c in Trainer(**QUIET).callbacks} == {"lightning"}

def test_that_fails_anyway():
    assert not Trainer(**QUIET).callbacks

@pytest.mark.skip
def test_skipped(): pass
"""


@pytest.fixture(autouse=True)
def in_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run pytest in a fork of a process that has imported Lightning."""

    def run(command: list[str], *, cwd: Path, env: dict[str, str], check: bool) -> Any:
        assert command[:2] == [sys.executable, "-m"]
        return forked.run(*command[2:], cwd=cwd, env=env)

    monkeypatch.setattr(lightning_suite, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "tests_pytorch"
    (folder / "callbacks").mkdir(parents=True)
    (folder / "callbacks" / "test_some.py").write_text(SUITE)
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "test_other.py").write_text("def test_not_run(): raise ValueError")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return folder


@pytest.mark.processes
def test_what_fails_with_us_alone_is_named(suite: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(suite), "--callback", "lookahead"]) == 1
    out = capfd.readouterr().out
    assert "without: 8 tests, 2 failed, 5 passed, 1 skipped" in out
    assert "lookahead: 8 tests, 1 documented, 2 failed, 4 passed, 1 skipped" in out
    assert "failed with lookahead alone: 1\n" in out
    assert out.rpartition("alone: 1\n")[2].strip().startswith("tests_pytorch/callbacks/test_some.py::test_no_callback_")


@pytest.mark.processes
@pytest.mark.parametrize("name", CALLBACKS)
def test_fits_pass_with_every_callback(suite: Path, name: str) -> None:
    outcomes = run(suite, name, ["-k", "fit_and_resume or hooks or one_of_ours"])
    assert set(outcomes.values()) == {"passed"}
    assert len(outcomes) == 4
