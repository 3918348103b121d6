"""The last, unfinished loop of a fit: closed before anyone looks for the last time, and open again in a resume."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

import lightning_entropy as le
from tests.lightning_modules import (
    BATCHES,
    CALLBACKS,
    LIGHTNING_WARNINGS,
    Automatic,
    Manual,
    Pair,
    batchnorm_net,
    loader,
    same,
    trainer,
    weights,
)

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]

METHODS = {
    **CALLBACKS,
    "heat3": lambda: le.HeatSmoothing(3, 1e3, seed=3),
    "outer momentum": lambda: le.InnerOuterCallback(le.diloco(5, 0.7, 0.9)),
    "reset momentum": lambda: le.EntropySGD(5, 0.5, 0.0, reset_momentum=True),
    "perturbed chain": lambda: le.InnerOuterCallback(le.Relaxation(inner_steps=5, width=0.01, outer_lr=0.5), seed=3),
}


def fit(module: Any, callback: L.Callback, *others: L.Callback, ckpt_path: Any = None, **kwargs: Any) -> L.Trainer:
    t = trainer(callbacks=[callback, *others], **{"max_epochs": -1, **kwargs})
    t.fit(module, loader(), loader(4), ckpt_path=ckpt_path)
    return t


@pytest.mark.parametrize("kind", [Automatic, Manual])
@pytest.mark.parametrize("name", METHODS)
def test_a_fit_shorter_than_a_loop_moves_the_weights(name: str, kind: Any) -> None:
    """Two steps of a loop of five or three."""
    module = kind()
    before = weights(module)
    fit(module, METHODS[name](), max_steps=2)
    moved = [not torch.equal(a, b) for a, b in zip(before, weights(module), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("ending", ["steps", "epochs", "stop", "fast_dev_run"])
def test_x_is_the_outer_step_of_what_there_is(ending: str) -> None:
    """Lookahead: half way to the last iterate, however the fit ends."""
    ends = {
        "steps": {"max_steps": 3},
        "epochs": {"max_epochs": 1, "limit_train_batches": 3},
        "stop": {"max_steps": 100},
        "fast_dev_run": {"fast_dev_run": 3, "max_epochs": 1},
    }

    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3 and ending == "stop":
                trainer.should_stop = True

    plain, module = Automatic(), Automatic()
    start = weights(plain)
    fit(plain, Stops(), **ends[ending])
    fit(module, le.InnerOuterCallback(le.lookahead(20, 0.25)), Stops(), **ends[ending])
    for x, y, got in zip(start, weights(plain), weights(module), strict=True):
        torch.testing.assert_close(got, x.lerp(y, 0.25))


def test_the_mean_gradient_of_an_unfinished_loop_of_heat() -> None:
    """Two of three gradients, at one point where there is no noise to speak of: a step along their mean."""
    module, plain = Automatic(), Automatic()
    fit(module, le.HeatSmoothing(3, 1e30), max_steps=2)
    optimizer = plain.configure_optimizers()
    for batch, _ in zip(loader(), range(2), strict=False):
        (plain.loss(batch) / 2).backward()
    optimizer.step()
    for a, b in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(a, b)


class Looks(L.Callback):
    """What validations, checkpoints and the end see."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append(weights(pl_module))


@pytest.mark.parametrize("name", METHODS)
def test_the_last_validation_and_checkpoint_see_what_is_left(tmp_path: Path, name: str) -> None:
    looks, module = Looks(), Automatic()
    saves = ModelCheckpoint(tmp_path, "last", save_weights_only=True)
    fit(module, METHODS[name](), looks, saves, max_epochs=1, limit_val_batches=1, enable_checkpointing=True)
    assert len(looks.seen) == 1
    assert same(looks.seen[0], weights(module))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert same([saved[n] for n, _ in module.named_parameters()], weights(module))


@pytest.mark.parametrize("kind", [Automatic, Manual, Pair])
@pytest.mark.parametrize("name", METHODS)
def test_a_resume_goes_on_as_if_it_had_not_been_closed(tmp_path: Path, name: str, kind: Any) -> None:
    """Twelve batches, a loop of five: the first epoch ends in the middle of the third."""
    whole = kind()
    fit(whole, METHODS[name](), max_epochs=2)
    first, second = kind(), kind()
    t = fit(first, METHODS[name](), max_epochs=1)
    t.save_checkpoint(tmp_path / "first.ckpt")
    fit(second, METHODS[name](), ckpt_path=tmp_path / "first.ckpt", max_epochs=2)
    assert same(weights(second), weights(whole))


def test_a_fit_that_goes_on_after_all_is_as_if_it_had_not_been_closed() -> None:
    """Stopped before min_epochs: the Trainer goes on, and so does the loop."""

    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    whole, module = Automatic(), Automatic()
    fit(whole, CALLBACKS["entropy"](), max_epochs=2)
    fit(module, CALLBACKS["entropy"](), Stops(), max_epochs=2, min_epochs=2)
    assert same(weights(module), weights(whole))


def test_early_stopping_ends_with_the_last_steps_in() -> None:
    stops = EarlyStopping("val", patience=1, min_delta=1e9)
    module = Automatic()

    def validation_step(batch: Any, batch_idx: int) -> None:
        module.log("val", 1.0)

    module.validation_step = validation_step  # type: ignore[method-assign]
    before = weights(module)
    with pytest.warns(UserWarning, match="two validations had the same weights"):
        fit(module, le.EntropySGD(1000), stops, max_epochs=10, limit_val_batches=1)
    assert not same(weights(module), before)


def test_a_validation_before_the_first_outer_step_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Automatic(), le.EntropySGD(9), val_check_interval=3, max_epochs=1, limit_val_batches=1)
    said = [r.message for r in caplog.records if "validation sees the initial weights" in r.message]
    assert len(said) == 1
    assert "inner_steps = 9" in said[0]


@pytest.mark.parametrize(
    ("net", "others", "hint"), [(None, [], False), ("bn", [], True), ("bn", [le.RefreshBatchNorm(2)], False)]
)
def test_what_is_going_to_happen_is_said_at_the_start(
    caplog: pytest.LogCaptureFixture, net: str | None, others: list[L.Callback], hint: bool
) -> None:
    module = Automatic(net=batchnorm_net() if net else None)
    with caplog.at_level(logging.INFO):
        trainer(callbacks=[le.EntropySGD(9), *others], max_steps=1).fit(module, loader())
    said = [r.message for r in caplog.records if r.message.startswith("EntropySGD: the weights that you keep move")]
    assert len(said) == 1 and "every 9 optimizer steps" in said[0]
    assert ("RefreshBatchNorm(20) re-estimates" in said[0]) == hint


def test_an_exception_does_not_close() -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise ValueError("broken image")

    module = Automatic()
    before = weights(module)
    with pytest.raises(ValueError, match="broken image"):
        fit(module, CALLBACKS["entropy"](), Fails(), max_steps=BATCHES)
    assert same(weights(module), before)


@pytest.mark.parametrize("name", ["reset momentum", "heat3"])
def test_closing_leaves_momentum_alone(name: str) -> None:
    """Also where the outer step zeroes it, and where heat takes a step of its own."""
    seen: list[Any] = []

    class Sees(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            state = trainer.optimizers[0].state_dict()["state"]
            seen.append([state[i]["momentum_buffer"].clone() for i in sorted(state)])

    fit(Automatic(), METHODS[name](), Sees(), max_steps=8)
    closed = seen[-1]
    seen.clear()
    fit(Automatic(), METHODS[name](), Sees(), max_steps=100)
    assert same(closed, seen[7])
