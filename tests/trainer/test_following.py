"""Optimizers that come and go, finders within a fit, and whoever else writes weights around a validation."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pytorch_optimizer import ScheduleFreeSGD
from torch import Tensor

import lightning_entropy as le
from tests.lightning_modules import (
    CALLBACKS,
    LIGHTNING_WARNINGS,
    Automatic,
    Manual,
    Pair,
    Stream,
    loader,
    same,
    trainer,
    weights,
)

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]


class Exchanging(Automatic):
    """Another optimizer from the given epoch on, brought in one of the ways there are."""

    def __init__(self, way: str, epoch: int = 1) -> None:
        super().__init__(lr=0.01)
        self.way, self.epoch, self.seen = way, epoch, list[float]()

    def on_train_epoch_start(self) -> None:
        if self.current_epoch != self.epoch:
            return
        if self.way == "assigned":
            self.trainer.optimizers = [torch.optim.Adam(self.parameters(), 0.05)]
        elif self.way == "set up again":
            self.configure_optimizers = lambda: torch.optim.Adam(self.parameters(), 0.05)  # type: ignore[method-assign]
            self.trainer.strategy.setup_optimizers(self.trainer)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.loss(batch).item())


@pytest.mark.parametrize("way", ["assigned", "set up again"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_training_goes_on_with_another_optimizer(name: str, way: str) -> None:
    module, callback = Exchanging(way), CALLBACKS[name]()
    trainer(callbacks=[callback], max_epochs=5, limit_val_batches=1.0).fit(module, loader(), loader(48))
    assert module.seen[-1] < 0.95 * module.seen[0]
    assert callback.state_dict()["optimizers"] == ["Adam"]


class Adding(Pair):
    """The critic gets its optimizer in the second epoch."""

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        self.second = optimizers[1]
        return optimizers[0]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if len(self.trainer.optimizers) == 2:
            super().training_step(batch, batch_idx)
            return
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.strategy.optimizers = [*self.trainer.strategy.optimizers, self.second]


@pytest.mark.parametrize("name", ["entropy", "heat"])
def test_an_added_optimizer_gets_a_loop_and_the_first_keeps_its_own(name: str) -> None:
    module, callback = Adding(), CALLBACKS[name]()
    critic = module.critic.weight.detach().clone()
    trainer(callbacks=[callback], max_epochs=3).fit(module, loader())
    first, second = callback.state_dict()["loops"]
    steps = callback.relaxation.inner_steps
    assert first["outer_step"] * steps + first["inner_step"] == 36
    assert second["outer_step"] * steps + second["inner_step"] == 12
    assert not torch.equal(module.critic.weight, critic)


@pytest.mark.parametrize("epochs", [1, 3])
def test_checkpoints_before_and_after_an_exchange_resume(tmp_path: Path, epochs: int) -> None:
    def module() -> Exchanging:
        net = Exchanging("assigned")
        if epochs == 3:  # who resumes after the exchange makes the optimizer that was there
            net.configure_optimizers = lambda: torch.optim.Adam(net.parameters(), 0.05)  # type: ignore[method-assign]
        return net

    whole, first, second = Exchanging("assigned"), Exchanging("assigned"), module()
    trainer(callbacks=[CALLBACKS["entropy"]()], max_epochs=5).fit(whole, loader())
    t = trainer(callbacks=[CALLBACKS["entropy"]()], max_epochs=epochs)
    t.fit(first, loader())
    t.save_checkpoint(tmp_path / "first.ckpt")
    trainer(callbacks=[CALLBACKS["entropy"]()], max_epochs=5).fit(second, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert same(weights(second), weights(whole))


# Finders


class RateLater(LearningRateFinder):
    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            before = everything(trainer, pl_module)
            self.lr_find(trainer, pl_module)
            assert equal(before, everything(trainer, pl_module))


class SizeLater(BatchSizeFinder):
    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            before = everything(trainer, pl_module)
            self.scale_batch_size(trainer, pl_module)
            assert equal(before, everything(trainer, pl_module))


def everything(trainer: Any, module: L.LightningModule) -> Any:
    """x, y, z, t of the callback, and the weights."""
    callback = next(c for c in trainer.callbacks if isinstance(c, le.InnerOuterCallback))
    assert callback._loops is not None
    return copy.deepcopy([*callback._loops.state_dict(anchor=True), dict(module.state_dict())])


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(v, w) for v, w in zip(a, b, strict=True))
    return bool(a == b)


class Tuned(Automatic):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(loader().dataset, self.batch_size)

    val_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:.*lr_find.*")
@pytest.mark.filterwarnings("ignore:.*weights_only.*")
@pytest.mark.parametrize("which", ["rate", "size"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_finder_in_a_later_epoch_leaves_no_trace(tmp_path: Path, name: str, which: str) -> None:
    finder: Any = RateLater(num_training_steps=8, early_stop_threshold=None)
    if which == "size":
        finder = SizeLater(max_trials=2, steps_per_trial=2)
    module = Tuned()
    before = weights(module)
    t = trainer(tmp_path, callbacks=[finder, CALLBACKS[name]()], max_epochs=3, limit_train_batches=7)
    t.fit(module)
    assert t.current_epoch == 3
    assert not same(weights(module), before)


# Writers around a validation


class Swaps(L.Callback):
    """Puts zeros in for a validation, and back what was there."""

    def __init__(self, on: str, off: str) -> None:
        self.kept: list[Tensor] = []
        setattr(self, on, self.swap)
        setattr(self, off, self.swap_back)

    def swap(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.kept = weights(pl_module)
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.zero_()

    def swap_back(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            for p, value in zip(pl_module.parameters(), self.kept, strict=False):
                p.copy_(value)
        self.kept = []


INSIDE = [
    ("on_validation_start", "on_validation_end"),
    ("on_validation_start", "on_validation_epoch_end"),
    ("on_validation_epoch_start", "on_validation_epoch_end"),
    ("on_validation_epoch_start", "on_validation_end"),
]


@pytest.mark.parametrize("hooks", INSIDE)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", CALLBACKS)
def test_swapping_in_a_validation_changes_nothing(name: str, first: bool, hooks: tuple[str, str]) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 4, "limit_val_batches": 1}
    plain, module = Automatic(), Automatic()
    trainer(callbacks=[CALLBACKS[name]()], **options).fit(plain, loader(), loader(4))
    callbacks = [Swaps(*hooks), CALLBACKS[name]()]
    t = trainer(callbacks=callbacks if first else callbacks[::-1], **options)
    t.fit(module, loader(), loader(4))
    assert same(weights(module), weights(plain))


class SwapsAround(Automatic):
    """Around the validation, as optimizers with modes ask for."""

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.swaps = Swaps("a", "b")
        self.swaps.swap(self.trainer, self)

    def on_validation_model_train(self) -> None:
        self.swaps.swap_back(self.trainer, self)
        self.train()


@pytest.mark.parametrize("name", CALLBACKS)
def test_swapping_around_a_validation_changes_nothing(name: str) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 4, "limit_val_batches": 1}
    plain, module = Automatic(), SwapsAround()
    trainer(callbacks=[CALLBACKS[name]()], **options).fit(plain, loader(), loader(4))
    trainer(callbacks=[CALLBACKS[name]()], **options).fit(module, loader(), loader(4))
    assert same(weights(module), weights(plain))


def test_a_swap_that_is_not_taken_back_in_the_validation_is_said() -> None:
    t = trainer(
        callbacks=[Swaps("on_validation_start", "on_train_batch_start"), CALLBACKS["entropy"]()],
        val_check_interval=4, limit_val_batches=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="were written while EntropySGD showed x to a validation"):
        t.fit(Automatic(), loader(), loader(4))


class Free(Automatic):
    """A schedule-free optimizer, whose modes are changed in the given hooks."""

    inside = False

    def configure_optimizers(self) -> Any:
        return ScheduleFreeSGD(self.parameters(), lr=0.1)

    def on_train_start(self) -> None:
        self.trainer.optimizers[0].train()  # type: ignore[attr-defined]

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        if not self.inside:
            self.trainer.optimizers[0].eval()  # type: ignore[attr-defined]

    def on_validation_model_train(self) -> None:
        if not self.inside:
            self.trainer.optimizers[0].train()  # type: ignore[attr-defined]
        self.train()

    def on_validation_epoch_start(self) -> None:
        if self.inside:
            self.trainer.optimizers[0].eval()  # type: ignore[attr-defined]

    def on_validation_epoch_end(self) -> None:
        if self.inside:
            self.trainer.optimizers[0].train()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["entropy", "jacobi", "heat"])
def test_a_schedule_free_optimizer_changes_its_weights_around_a_validation(name: str) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 4, "num_sanity_val_steps": 0}
    plain, module = Free(), Free()
    callback: Any = CALLBACKS[name]()
    trainer(callbacks=[CALLBACKS[name]()], max_epochs=2, limit_val_batches=0).fit(plain, loader())
    trainer(callbacks=[callback], limit_val_batches=1, **options).fit(module, loader(), loader(4))
    for a, b in zip(weights(module), weights(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # eval() and train() round


def test_a_schedule_free_optimizer_that_does_so_inside_of_it_is_refused() -> None:
    module = Free()
    module.inside = True
    t = trainer(callbacks=[CALLBACKS["entropy"]()], limit_val_batches=1, num_sanity_val_steps=0)
    with pytest.raises(MisconfigurationException, match=r"ScheduleFreeSGD must not .* while EntropySGD shows x"):
        t.fit(module, loader(), loader(4))


# Resumes with something changed


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    t = trainer(callbacks=[CALLBACKS["entropy"]()], max_steps=7)
    t.fit(Automatic(), Stream())
    t.save_checkpoint(tmp_path / "seven.ckpt")
    return tmp_path / "seven.ckpt"


def resume(path: Path, callback: L.Callback, module: Any = None) -> Any:
    module = Automatic() if module is None else module
    trainer(callbacks=[callback], max_epochs=-1, max_steps=12).fit(module, Stream(), ckpt_path=path)
    return module


def test_another_setting_is_one_line(checkpoint: Path) -> None:
    with pytest.warns(UserWarning, match="inner_steps was 5, is 4; average was 0.75, is 0.5") as said:
        resume(checkpoint, le.EntropySGD(4, le.Scoping(0.5, 0.1), 0.01, 0.5))
    assert sum("another method" in str(w.message) for w in said) == 1


def test_a_seed_that_has_no_effect_is_said(checkpoint: Path) -> None:
    with pytest.warns(UserWarning, match="seed = 9 has no effect: the noise goes on with the checkpoint's seed, 3"):
        resume(checkpoint, le.EntropySGD(5, le.Scoping(0.5, 0.1), 0.01, seed=9))


def test_another_optimizer_class_is_an_error_or_a_warning(checkpoint: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"optimizer 0 must be SGD .* got AdamW, which keeps another"):
        resume(checkpoint, CALLBACKS["entropy"](), Automatic("adamw"))


def test_one_kind_of_loop_cannot_go_on_from_the_other(tmp_path: Path) -> None:
    t = trainer(callbacks=[le.InnerOuterCallback(le.lookahead())], max_steps=7)
    t.fit(Automatic(), Stream())
    t.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match=r"perturb must be False to go on .* got True"):
        resume(tmp_path / "a.ckpt", le.InnerOuterCallback(le.heat()))


def test_a_newer_format_is_an_error_that_names_both(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=False)
    content["callbacks"]["EntropySGD"]["format"] = 99
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match="EntropySGD in a checkpoint must be of format 1 or older, got format 99"):
        resume(checkpoint, CALLBACKS["entropy"]())


def test_manual_optimization_follows_too() -> None:
    class Exchanges(Manual):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.optimizers = [torch.optim.Adam(self.parameters(), 0.05)]

    module, callback = Exchanges(), CALLBACKS["entropy"]()
    trainer(callbacks=[callback], max_epochs=2).fit(module, loader())
    assert callback.state_dict()["optimizers"] == ["Adam"]
