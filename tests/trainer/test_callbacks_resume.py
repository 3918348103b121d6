"""Stop anywhere, go on, and end bit for bit where an undisturbed run does."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_entropy as le
from tests.kill_callback import kill_and_resume
from tests.lightning_modules import (
    BATCHES,
    CALLBACKS,
    LIGHTNING_WARNINGS,
    Automatic,
    Manual,
    Pair,
    Stream,
    batchnorm_net,
    loader,
    same,
    trainer,
    weights,
)

# A ModelCheckpoint that wrote the file and is not there when it is read; not about what we do.
LEFT_OVER = "ignore:.*callbacks used to create the checkpoint need to be provided.*ModelCheckpoint"
pytestmark = [pytest.mark.filterwarnings(w) for w in (*LIGHTNING_WARNINGS, LEFT_OVER)]

KINDS: dict[str, Any] = {"automatic": Automatic, "manual": Manual, "pair": Pair}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLBACKS)
def test_resume_in_the_middle_of_an_inner_loop_and_of_an_epoch(tmp_path: Path, name: str, kind: str) -> None:
    """From every third step, also the first ones and the last of an epoch."""
    whole = KINDS[kind]()
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    t = trainer(tmp_path, callbacks=[CALLBACKS[name](), keep], enable_checkpointing=True, max_epochs=2)
    t.fit(whole, Stream())
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) >= BATCHES
    for file in files[::3]:
        resumed = KINDS[kind]()
        trainer(callbacks=[CALLBACKS[name]()], max_epochs=2).fit(resumed, Stream(), ckpt_path=file)
        assert same(weights(resumed), weights(whole)), file.name


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["entropy", "pull", "heat"])
def test_resume_where_parameters_are_narrower_than_x(tmp_path: Path, name: str, precision: Any) -> None:
    whole = Automatic(lr=0.02)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    t = trainer(callbacks=[CALLBACKS[name](), keep], enable_checkpointing=True, precision=precision)
    t.fit(whole, Stream())
    for file in tmp_path.glob("*.ckpt"):
        resumed = Automatic(lr=0.02)
        trainer(callbacks=[CALLBACKS[name]()], precision=precision).fit(resumed, Stream(), ckpt_path=file)
        assert same(weights(resumed), weights(whole))


def test_resume_with_refreshed_batchnorm(tmp_path: Path) -> None:
    """Weights and statistics, also where validation and its refresh come in the middle of a loop."""

    def fit(path: Path | None, *more: L.Callback) -> dict[str, Any]:
        module = Automatic(net=batchnorm_net())
        callbacks = [CALLBACKS["entropy"](), le.RefreshBatchNorm(3, dataloader=loader(seed=5)), *more]
        t = trainer(callbacks=callbacks, enable_checkpointing=bool(more), max_epochs=2, limit_val_batches=1,
                    val_check_interval=4)  # fmt: skip
        t.fit(module, Stream(), loader(8), ckpt_path=path)
        return dict(module.state_dict())

    whole = fit(None, ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 2 * BATCHES
    for file in files[::5]:
        assert same(fit(file), whole), file.name


@pytest.mark.parametrize("name", CALLBACKS)
def test_training_that_ended_in_the_middle_of_a_loop_goes_on(tmp_path: Path, name: str) -> None:
    """From ``last.ckpt``, from a checkpoint saved after fit, and in the same Trainer."""
    whole = Automatic()
    trainer(callbacks=[CALLBACKS[name]()], max_epochs=3).fit(whole, Stream())

    module = Automatic()
    t = trainer(tmp_path, callbacks=[CALLBACKS[name](), ModelCheckpoint(tmp_path, save_last=True)],
                enable_checkpointing=True)  # fmt: skip
    t.fit(module, Stream())
    t.save_checkpoint(tmp_path / "after.ckpt")
    x = weights(module)
    for path in ("last.ckpt", "after.ckpt"):
        assert same(list(torch.load(tmp_path / path)["state_dict"].values()), x)
        resumed = Automatic()
        trainer(callbacks=[CALLBACKS[name]()], max_epochs=3).fit(resumed, Stream(), ckpt_path=tmp_path / path)
        assert same(weights(resumed), weights(whole))
    assert t.fit_loop.max_epochs is not None
    t.fit_loop.max_epochs = 3
    t.fit(module, Stream(), ckpt_path="last")
    assert same(weights(module), weights(whole))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize(("kind", "kill_at"), [("automatic", 8), ("automatic", 21), ("manual", 3), ("pair", 13)])
def test_killed_in_a_step_and_resumed(tmp_path: Path, kind: str, name: str, kill_at: int) -> None:
    resumed, whole = kill_and_resume(tmp_path, kind, name, kill_at)
    assert same(resumed, whole)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_checkpoint_with_us_resumes_and_tests_without(tmp_path: Path, name: str) -> None:
    """Lightning says which callback's state is left over; the weights are x."""
    t = trainer(callbacks=[CALLBACKS[name]()], max_steps=8)
    t.fit(Automatic(), Stream())
    t.save_checkpoint(tmp_path / "with.ckpt")
    x = list(torch.load(tmp_path / "with.ckpt")["state_dict"].values())
    module = Automatic()
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        trainer(max_epochs=2).fit(module, Stream(), ckpt_path=tmp_path / "with.ckpt")
    assert not same(weights(module), x)
    tested = Automatic()
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        trainer().test(tested, loader(8), ckpt_path=tmp_path / "with.ckpt", verbose=False)
    assert same(weights(tested), x)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_checkpoint_without_us_resumes_with(tmp_path: Path, name: str) -> None:
    t = trainer()
    t.fit(Automatic(), Stream())
    t.save_checkpoint(tmp_path / "without.ckpt")
    module = Automatic()
    callback = CALLBACKS[name]()
    trainer(callbacks=[callback], max_epochs=2).fit(module, Stream(), ckpt_path=tmp_path / "without.ckpt")
    state = callback.state_dict()["loops"][0]
    steps = state["outer_step"] * callback.relaxation.inner_steps + state["inner_step"]
    assert steps == BATCHES


def test_a_checkpoint_of_another_method_is_said(tmp_path: Path) -> None:
    t = trainer(callbacks=[CALLBACKS["entropy"]()], max_steps=8)
    t.fit(Automatic(), Stream())
    t.save_checkpoint(tmp_path / "entropy.ckpt")
    callback = CALLBACKS["jacobi"]()
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"),
        pytest.warns(UserWarning, match="the checkpoint's loop is of EntropySGD, not of HamiltonJacobi"),
    ):
        trainer(callbacks=[callback], max_epochs=2).fit(Automatic(), Stream(), ckpt_path=tmp_path / "entropy.ckpt")
    assert callback.state_dict()["loops"][0]["outer_step"] > 0


def test_two_optimizers_do_not_resume_as_one(tmp_path: Path) -> None:
    t = trainer(callbacks=[CALLBACKS["entropy"]()], max_steps=8)
    t.fit(Pair(), Stream())
    t.save_checkpoint(tmp_path / "pair.ckpt")
    checkpoint = torch.load(tmp_path / "pair.ckpt")
    assert checkpoint["callbacks"]["EntropySGD"]["loops"][1]["seed"] == 3 + (1 << 64)
    checkpoint["state_dict"] = Automatic().state_dict()
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    with pytest.raises(MisconfigurationException, match="must be of 1 optimizers, got 2"):
        trainer(callbacks=[CALLBACKS["entropy"]()], max_epochs=3).fit(
            Automatic(), Stream(), ckpt_path=tmp_path / "odd.ckpt"
        )


def test_the_resumed_run_keeps_the_noise_of_the_seed_it_began_with(tmp_path: Path) -> None:
    def callback() -> le.EntropySGD:
        return le.EntropySGD(5, 0.5, 0.1)  # the seed is torch's

    torch.manual_seed(11)
    t = trainer(callbacks=[callback(), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=7)],
                enable_checkpointing=True)  # fmt: skip
    whole = Automatic()
    torch.manual_seed(11)
    t.fit(whole, Stream())
    resumed = Automatic()
    torch.manual_seed(12)
    trainer(callbacks=[callback()]).fit(resumed, Stream(), ckpt_path=tmp_path / "last.ckpt")
    assert same(weights(resumed), weights(whole))
