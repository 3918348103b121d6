"""What is trained: the callbacks under every way in which a Trainer can step an optimizer."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_entropy as le
from tests.lightning_modules import (
    BATCHES,
    CALLBACKS,
    LIGHTNING_WARNINGS,
    Automatic,
    Endless,
    Manual,
    Pair,
    batchnorm_net,
    loader,
    make_optimizer,
    same,
    trainer,
    weights,
)

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]


def trained(module: L.LightningModule, *callbacks: L.Callback, batches: Any = None, **kwargs: Any) -> list[Tensor]:
    trainer(callbacks=list(callbacks), **kwargs).fit(module, loader() if batches is None else batches)
    return weights(module)


def plainly(name: str, batches: list[Any], module: Automatic | None = None) -> list[Tensor]:
    """Train with the engine and no Trainer, on the same batches."""
    callback = CALLBACKS[name]()
    module = Automatic() if module is None else module
    optimizer = module.configure_optimizers()
    loop = le.relax(optimizer, callback.relaxation, outer=callback.outer, seed=callback.seed or 0)
    for batch in batches:
        loop.begin()
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    loop.close()
    loop.detach()
    return weights(module)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "fused"])
@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_one_inner_step_is_the_users_optimizer_bit_for_bit_over_100_steps(kind: Any, optimizer: str) -> None:
    fit = {"max_epochs": -1, "max_steps": 100}
    with_us = trained(kind(optimizer), le.InnerOuterCallback(le.Relaxation()), **fit)
    assert same(with_us, trained(kind(optimizer), **fit))


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_automatic_or_manual_is_the_engine_bit_for_bit(name: str) -> None:
    expected = plainly(name, list(loader()))
    assert not same(expected, weights(Automatic()))
    assert same(trained(Automatic(), CALLBACKS[name]()), expected)
    assert same(trained(Manual(), CALLBACKS[name]()), expected)


@pytest.mark.filterwarnings("ignore:offload_anchor=True gains nothing")
def test_an_anchor_that_is_offloaded_is_the_same_bits() -> None:
    near, away = (le.InnerOuterCallback(le.snoo(3), offload_anchor=on) for on in (False, True))
    assert same(trained(Automatic(), away), trained(Automatic(), near))
    states = [callback.state_dict()["loops"][0]["outer"]["state"] for callback in (away, near)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["entropy", "heat"])
def test_every_optimizer_has_its_loop_and_its_noise(name: str) -> None:
    callback = CALLBACKS[name]()
    got = trained(Pair(), callback)

    module = Pair()
    optimizers = module.configure_optimizers()
    loops = [le.relax(o, callback.relaxation, seed=3 + (i << 64)) for i, o in enumerate(optimizers)]
    for i, batch in enumerate(loader()):
        for loop in loops:
            loop.begin()
        optimizers[0].zero_grad()
        (module.loss(batch) - 0.1 * module.critic(module(batch[0])).mean()).backward()
        optimizers[0].step()
        if i % 2 == 0:
            optimizers[1].zero_grad()
            module.critic(module(batch[0]).detach()).square().mean().backward()
            optimizers[1].step()
    assert [loop.outer_step for loop in loops] == ([2, 1] if name == "entropy" else [4, 2])
    for loop in loops:
        loop.close()
        loop.detach()
    assert same(got, weights(module))


@pytest.mark.parametrize("name", ["entropy", "jacobi", "heat"])
def test_accumulation_makes_one_inner_step_of_several_batches(name: str) -> None:
    got = trained(Automatic(), CALLBACKS[name](), accumulate_grad_batches=2)
    batches = list(loader())
    merged = [[torch.cat(parts) for parts in zip(*batches[i : i + 2], strict=True)] for i in range(0, BATCHES, 2)]
    for a, b in zip(got, plainly(name, merged), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["value", "norm"])
def test_the_gradient_is_clipped_before_it_is_used(algorithm: str) -> None:
    clip = 0.05
    got = trained(Automatic(), CALLBACKS["pull"](), gradient_clip_val=clip, gradient_clip_algorithm=algorithm)

    module, callback = Automatic(), CALLBACKS["pull"]()
    optimizer = module.configure_optimizers()
    loop = le.relax(optimizer, callback.relaxation, seed=3)
    for batch in loader():
        optimizer.zero_grad()
        module.loss(batch).backward()
        if algorithm == "value":
            nn.utils.clip_grad_value_(module.parameters(), clip)
        else:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    loop.close()
    loop.detach()
    assert same(got, weights(module))


@pytest.mark.parametrize("name", ["entropy", "jacobi", "heat"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_precision(name: str, precision: Any) -> None:
    """Every precision trains near float32; x and z are float32 or wider whatever the parameters are."""
    callback = CALLBACKS[name]()
    kinds: list[torch.dtype] = []

    class Look(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert callback._loops is not None
            kinds.extend(slot.anchor.dtype for loop in callback._loops.loops for slot in loop.weights)

    got = trained(Automatic(lr=0.02), callback, Look(), precision=precision)
    assert set(kinds) == {torch.float64 if precision == "64-true" else torch.float32}
    reference = trained(Automatic(lr=0.02), CALLBACKS[name]())
    for a, b in zip(got, reference, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a.float(), b, rtol=0, atol=0.05)


class Exploding(Automatic):
    """One batch has an infinite loss."""

    bad = 3

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss * float("inf") if batch_idx == self.bad else loss


def scaled() -> MixedPrecision:
    """float16 on the CPU: Lightning refuses "16-mixed" there, and takes the same plugin."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=10**6))


@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
@pytest.mark.parametrize("name", ["entropy", "coupled", "pull", "heat"])
def test_a_step_that_the_scaler_skips_did_not_happen(name: str, optimizer: str) -> None:
    """Without the bad batch, and with the loss scale halved from there on, nothing differs."""
    got = trained(Exploding(optimizer), CALLBACKS[name](), plugins=scaled())
    assert all(torch.isfinite(p).all() for p in got)
    batches = [batch for i, batch in enumerate(loader()) if i != Exploding.bad]
    module = Automatic(optimizer)
    callback = CALLBACKS[name]()
    raw = module.configure_optimizers()
    loop = le.relax(raw, callback.relaxation, seed=3)
    for batch in batches:
        loop.begin()
        raw.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = module.loss(batch)
        loss.backward()
        raw.step()
    loop.close()
    loop.detach()
    for a, b in zip(got, weights(module), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_without_a_scaler_a_bad_batch_does_what_it_does_to_the_plain_optimizer() -> None:
    got = trained(Exploding(), CALLBACKS["jacobi"]())
    plain = trained(Exploding())
    assert [torch.isnan(p).any().item() for p in got] == [torch.isnan(p).any().item() for p in plain]


@pytest.mark.parametrize("name", ["entropy", "heat"])
@pytest.mark.parametrize("what", ["module", "submodule"])
def test_a_compiled_module_is_the_module(name: str, what: str) -> None:
    module = Automatic()
    callback = CALLBACKS[name]()
    keys: list[str] = []

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 7:
                keys.extend(pl_module.state_dict())
                saved.update(copy.deepcopy(pl_module.state_dict()))
                assert callback._loops is not None
                anchors.extend(x.clone() for x in callback._loops.loops[0].anchor)

    saved: dict[str, Tensor] = {}
    anchors: list[Tensor] = []
    if what == "module":
        compiled: Any = torch.compile(module, backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
        compiled = module
    trainer(callbacks=[callback, Save()]).fit(compiled, loader())
    assert same(weights(module), plainly(name, list(loader())))
    assert same(list(saved.values()), anchors)


class Silent(Automatic):
    """Every third training step has nothing to learn from."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return None if batch_idx % 3 == 2 else self.loss(batch)


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_training_step_that_returns_none_did_not_happen(name: str) -> None:
    got = trained(Silent(), CALLBACKS[name]())
    assert same(got, plainly(name, [batch for i, batch in enumerate(loader()) if i % 3 != 2]))


class Impatient(Automatic):
    """Leaves every epoch after seven batches, in the middle of an inner loop."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 7 else None


@pytest.mark.parametrize("name", ["entropy", "heat"])
def test_an_epoch_may_be_left_early(name: str) -> None:
    got = trained(Impatient(), CALLBACKS[name](), max_epochs=2)
    seven = list(loader())[:7]
    assert same(got, plainly(name, seven + seven))


def test_an_iterable_dataset_without_a_length() -> None:
    got = trained(Automatic(), CALLBACKS["entropy"](), batches=DataLoader(Endless(4 * BATCHES), batch_size=4))
    assert same(got, plainly("entropy", list(loader())))


class Raw(Manual):
    """Steps the torch optimizer itself, past Lightning."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_steps_past_lightning_count() -> None:
    got = trained(Raw(), CALLBACKS["entropy"](), max_epochs=1)
    assert same(got, plainly("entropy", list(loader())))


class Scheduled(Automatic):
    """Three kinds of schedulers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.lrs: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.lrs.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer("sgd", self.parameters())
        if self.kind == "plateau":
            scheduler: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.kind}}


@pytest.mark.parametrize("kind", ["step", "epoch", "plateau"])
def test_schedulers_keep_their_meaning(kind: str) -> None:
    module, plain = Scheduled(kind), Scheduled(kind)
    for m, callbacks in ((module, [CALLBACKS["entropy"]()]), (plain, [])):
        trainer(callbacks=callbacks, max_epochs=3, limit_val_batches=1).fit(m, loader(), loader(8))
    assert module.lrs == plain.lrs
    assert len(set(module.lrs)) > 2


class Finetuned(Automatic):
    """The first layer is frozen for seven batches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(batch_idx >= 7)  # type: ignore[index]


@pytest.mark.parametrize("name", ["entropy", "heat"])
def test_a_layer_unfrozen_in_the_middle_of_a_loop(name: str) -> None:
    start = weights(Automatic())
    module = Finetuned()
    trainer(callbacks=[CALLBACKS[name]()], max_steps=7).fit(module, loader())
    assert same(weights(module)[:2], start[:2])
    module = Finetuned()
    got = trained(module, CALLBACKS[name]())
    assert not same(got[:1], start[:1])


def test_batchnorm_and_dropout_nets_train() -> None:
    got = trained(Automatic(net=batchnorm_net(0.5)), CALLBACKS["entropy"]())
    assert all(torch.isfinite(p).all() for p in got)
