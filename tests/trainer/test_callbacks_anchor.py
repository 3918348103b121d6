"""Who sees x: everyone who looks, by every way of looking, at any moment."""

import copy
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lightning_entropy as le
from tests.lightning_modules import (
    BATCHES,
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

L_STEPS = 5
BETWEEN_BATCHES = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
                   "on_before_optimizer_step", "on_train_batch_end")  # fmt: skip
HOOKS = [name for name in vars(L.Callback) if name.startswith("on_") or name in ("setup", "teardown")]
OTHER_ARGUMENTS = ("on_save_checkpoint", "on_load_checkpoint", "on_exception")


class Observer(L.Callback):
    """Check at every hook that the state dict is x and, outside training batches, the parameters too.

    x is known here without asking the loop: what the parameters were after every L-th batch, when y starts at x.
    """

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.seen: list[str] = []
        self.steps = 0
        self.differed = 0
        for name in HOOKS:
            setattr(self, name, self._checker(name))

    @property
    def state_key(self) -> str:
        return f"Observer{id(self)}"

    def _checker(self, hook: str) -> Any:
        def check(trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
            self.seen.append(hook)
            if not self.x:
                self.x = weights(pl_module)
            if hook == "on_train_batch_end":
                self.steps += 1
                if self.steps % L_STEPS == 0 or self.steps == 2 * BATCHES:  # the last batch closes the loop
                    self.x = weights(pl_module)
                self.differed += not same(weights(pl_module), self.x)
            assert same([pl_module.state_dict()[name] for name, _ in pl_module.named_parameters()], self.x), hook
            if hook not in BETWEEN_BATCHES:
                assert same(weights(pl_module), self.x), hook

        return check


@pytest.mark.parametrize("name", ["entropy", "jacobi", "pull", "adam"])
@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_at_every_hook_of_a_fit_whoever_looks_sees_x(kind: Any, name: str) -> None:
    before, after = Observer(), Observer()
    callback = CALLBACKS[name]()
    t = trainer(callbacks=[before, callback, after], max_epochs=2, val_check_interval=4, limit_val_batches=1,
                num_sanity_val_steps=1)  # fmt: skip
    module = kind()
    t.fit(module, loader(), loader(8))
    t.validate(module, loader(8), verbose=False)
    t.test(module, loader(8), verbose=False)
    t.predict(module, loader(8))
    for observer in (before, after):
        skipped = {"on_before_zero_grad"} if kind is Manual else set()
        assert set(HOOKS) - set(observer.seen) <= {*OTHER_ARGUMENTS, *skipped}
        assert observer.steps == 2 * BATCHES
        assert observer.differed == 2 * BATCHES - 2 * BATCHES // L_STEPS - 1
        assert same(weights(module), observer.x)


class Anchors(L.Callback):
    """Write down x after every batch, by global step, as the loop has it."""

    def __init__(self, callback: le.InnerOuterCallback) -> None:
        self.callback = callback
        self.x: dict[int, list[Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        assert self.callback._loops is not None
        self.x[trainer.global_step] = [x.clone() for loop in self.callback._loops.loops for x in loop.anchor]


def saved(path: Path) -> tuple[int, list[Tensor]]:
    checkpoint = torch.load(path)  # weights_only by default: nothing in it may need more
    return checkpoint["global_step"], list(checkpoint["state_dict"].values())


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize(
    "options",
    [
        {"every_n_train_steps": 3, "save_top_k": -1},
        {"every_n_train_steps": 7, "save_top_k": -1, "save_weights_only": True},
        {"every_n_train_steps": 4, "save_last": True},
        {"monitor": "val_loss", "save_top_k": -1},
        {"every_n_epochs": 1, "save_on_train_epoch_end": True, "save_last": True, "save_weights_only": True},
    ],
    ids=["steps", "weights", "last", "monitor", "epoch"],
)
def test_every_flavour_of_checkpoint_has_x(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    callback = CALLBACKS[name]()
    anchors = Anchors(callback)
    t = trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path, **options), callback, anchors], max_epochs=2,
                enable_checkpointing=True, val_check_interval=4, limit_val_batches=1)  # fmt: skip
    t.fit(Automatic(), loader(), loader(8))
    files = sorted(tmp_path.glob("*.ckpt"))
    assert files
    for file in files:
        step, state = saved(file)
        assert same(state, anchors.x[step]), file


@pytest.mark.parametrize("how", ["trainer", "weights", "state_dict", "submodule", "async"])
def test_a_user_may_save_in_the_middle_of_an_epoch(tmp_path: Path, how: str) -> None:
    callback = CALLBACKS["entropy"]()
    anchors = Anchors(callback)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step not in (7, 8):
                return
            file = tmp_path / f"{trainer.global_step}.ckpt"
            if how == "state_dict":
                torch.save({"global_step": trainer.global_step, "state_dict": pl_module.state_dict()}, file)
            elif how == "submodule":
                torch.save({"global_step": trainer.global_step, "state_dict": pl_module.net.state_dict()}, file)
            else:
                trainer.save_checkpoint(file, weights_only=how == "weights")

    plugins = AsyncCheckpointIO() if how == "async" else None
    trainer(callbacks=[Save(), callback, anchors], plugins=plugins).fit(Automatic(), loader())
    for step in (7, 8):
        assert saved(tmp_path / f"{step}.ckpt")[0] == step
        assert same(saved(tmp_path / f"{step}.ckpt")[1], anchors.x[step])


def test_a_checkpoint_from_a_signal_handler_in_the_middle_of_a_backward_pass(tmp_path: Path) -> None:
    callback = CALLBACKS["entropy"]()
    anchors = Anchors(callback)

    class Signalled(Automatic):
        def on_after_backward(self) -> None:
            if self.global_step == 8:
                signal.signal(signal.SIGUSR1, lambda *_: self.trainer.save_checkpoint(tmp_path / "s.ckpt"))
                os.kill(os.getpid(), signal.SIGUSR1)
                signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    trainer(callbacks=[callback, anchors]).fit(Signalled(), loader())
    step, state = saved(tmp_path / "s.ckpt")
    assert step == 8
    assert same(state, anchors.x[8])


class Tied(Automatic):
    """One weight under two names, and one that is computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.decoder.weight = self.encoder.weight
        self.normed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.extra = nn.ParameterList([nn.Parameter(torch.ones(6))])
        self.scale = self.same_scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.normed(self.decoder(torch.tanh(self.encoder(self.net[0](x)))))  # type: ignore[index]
        return self.net[2](hidden * self.extra[0] * self.scale)  # type: ignore[index]


def test_tied_weights_parametrizations_and_parameter_lists() -> None:
    callback = CALLBACKS["entropy"]()
    states: list[dict[str, Tensor]] = []
    parts: list[dict[str, Tensor]] = []

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            states.append(copy.deepcopy(pl_module.state_dict()))
            parts.append(copy.deepcopy(pl_module.normed.state_dict(prefix="normed.")))
            if trainer.global_step == 6:
                assert not same(list(pl_module.state_dict(keep_vars=False).values()), weights(pl_module))

    module = Tied()
    trainer(callbacks=[callback, Save()], max_steps=8).fit(module, loader())
    # There is an outer step after five steps and, as training ends, after eight.
    assert len(module.state_dict()) == len(weights(module)) + 2
    for state, part in zip(states[4:7], parts[4:7], strict=True):
        assert same(state, states[4])
        assert same(part, {k: v for k, v in state.items() if k.startswith("normed.")})
    assert same(states[7], dict(module.state_dict()))
    assert not same(states[3], states[4])
    assert not same(states[6], states[7])


class Failure(Exception):
    """What is raised in these tests."""


class Failing(Automatic):
    """Raises in the step of its choice."""

    error: BaseException = Failure()
    where = "training"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.where == "training" and batch_idx == 8:
            raise self.error
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.where == "update" and self.global_step == 8:
            raise self.error

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.where == "validation":
            raise self.error


class FailingCallback(L.Callback):
    """Raises after the eighth batch."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 8:
            raise self.error


@pytest.mark.parametrize("error", [Failure(), KeyboardInterrupt(), SystemExit(3)], ids=["error", "ctrl-c", "exit"])
@pytest.mark.parametrize("where", ["training", "update", "validation", "callback"])
@pytest.mark.parametrize("first", [True, False])
def test_after_an_exception_the_module_holds_x(tmp_path: Path, where: str, error: BaseException, first: bool) -> None:
    callback = CALLBACKS["entropy"]()
    anchors = Anchors(callback)
    others = [anchors, ModelCheckpoint(tmp_path, save_on_exception=True, filename="e"), FailingCallback(error)]
    if where != "callback":
        others.pop()
    module = Failing()
    module.where, module.error = where, error
    t = trainer(tmp_path, callbacks=[callback, *others] if first else [*others, callback], limit_val_batches=1,
                val_check_interval=8, enable_checkpointing=True)  # fmt: skip
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)):
        t.fit(module, loader(), loader(8))
    x = anchors.x[max(anchors.x)] if where != "callback" or first else anchors.x[7]
    assert same(weights(module), x)
    assert same(list(module.state_dict().values()), x)
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    for file in files:
        assert same(saved(file)[1], x)
        assert torch.load(file)["callbacks"]["EntropySGD"]["loops"][0]["inner_step"] == 3
    assert not module.net[0]._state_dict_hooks  # type: ignore[index]


@pytest.mark.parametrize("name", ["entropy", "heat"])
def test_the_heat_and_the_chain_leave_x_after_an_exception_in_the_step(name: str) -> None:
    module = Failing()
    module.where = "update"
    callback = CALLBACKS[name]()
    anchors = Anchors(callback)
    with pytest.raises(Failure):
        trainer(callbacks=[callback, anchors]).fit(module, loader())
    assert same(weights(module), anchors.x[8])


@pytest.mark.parametrize("ended", ["well", "badly"])
def test_afterwards_the_module_is_a_plain_module(ended: str) -> None:
    """Another Trainer, or plain PyTorch, trains it as if we had never been there; even the same optimizer."""
    module = Failing()
    module.where = "none" if ended == "well" else "training"
    kept = module.configure_optimizers()
    module.configure_optimizers = lambda: kept  # type: ignore[method-assign]
    callback = CALLBACKS["entropy"]()
    t = trainer(callbacks=[callback], max_steps=9)
    if ended == "well":
        t.fit(module, loader())
    else:
        with pytest.raises(Failure):
            t.fit(module, loader())
    assert not kept._optimizer_step_pre_hooks
    assert not kept._optimizer_step_post_hooks
    twin = Automatic()
    twin.load_state_dict(module.state_dict())
    module.where = "none"
    del module.configure_optimizers
    trainer().fit(module, loader())
    trainer().fit(twin, loader())
    assert same(weights(module), weights(twin))
    assert same(list(module.state_dict().values()), weights(module))
    module.configure_optimizers = lambda: kept  # type: ignore[method-assign]
    trainer(callbacks=[callback]).fit(module, loader())


def test_fit_twice_starts_a_new_first_loop_as_it_starts_new_optimizers() -> None:
    callback = CALLBACKS["entropy"]()
    module, twin = Automatic(), Automatic()
    t = trainer(callbacks=[callback])
    t.fit(module, loader())
    twin.load_state_dict(module.state_dict())
    t.fit_loop.max_epochs = 2
    t.fit(module, loader())
    trainer(callbacks=[CALLBACKS["entropy"]()]).fit(twin, loader())
    assert same(weights(module), weights(twin))


def test_state_that_validation_loaded_does_not_leak_into_the_next_fit(tmp_path: Path) -> None:
    t = trainer(callbacks=[CALLBACKS["entropy"]()], max_steps=8)
    t.fit(Automatic(), loader())
    t.save_checkpoint(tmp_path / "8.ckpt")
    assert torch.load(tmp_path / "8.ckpt")["callbacks"]["EntropySGD"]["loops"][0]["inner_step"] == 3
    module, twin = Automatic(), Automatic()
    t = trainer(callbacks=[CALLBACKS["entropy"]()], limit_val_batches=1)
    t.validate(module, loader(8), ckpt_path=tmp_path / "8.ckpt", verbose=False)
    twin.load_state_dict(module.state_dict())
    t.fit(module, loader(), loader(8))
    trainer(callbacks=[CALLBACKS["entropy"]()]).fit(twin, loader())
    assert same(weights(module), weights(twin))


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_resumed_fit_shows_x_until_its_first_batch(tmp_path: Path, name: str) -> None:
    t = trainer(callbacks=[CALLBACKS[name](), ModelCheckpoint(tmp_path, every_n_train_steps=8)],
                enable_checkpointing=True)  # fmt: skip
    t.fit(Automatic(), Stream())
    (file,) = tmp_path.glob("*.ckpt")
    x = saved(file)[1]
    seen: list[str] = []

    class Look(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            assert same(weights(pl_module), x)

        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            seen.append("start")
            assert same(weights(pl_module), x)
            assert same(list(pl_module.state_dict().values()), x)

    more = [Look(), ModelCheckpoint(tmp_path, every_n_train_steps=8)]
    t = trainer(callbacks=[CALLBACKS[name](), *more], max_epochs=2, enable_checkpointing=True)
    t.fit(Automatic(), Stream(), ckpt_path=file)
    assert seen == ["start"]


def test_weights_that_a_user_changes_between_epochs_are_the_new_x() -> None:
    class Zero(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                with torch.no_grad():
                    pl_module.net[0].weight.zero_()

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == BATCHES + 1:
                seen.append(pl_module.state_dict()["net.0.weight"].clone())
                assert pl_module.net[0].weight.any()

    seen: list[Tensor] = []
    trainer(callbacks=[CALLBACKS["entropy"](), Zero()], max_epochs=2).fit(Automatic(), loader())
    assert not seen[0].any()


def test_copies_and_pickles_of_a_module_in_training_are_free_of_us() -> None:
    made: list[Any] = []

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 7:
                made.extend([copy.deepcopy(pl_module.net), pickle.loads(pickle.dumps(pl_module.net))])
                made.append(weights(pl_module.net))

    trainer(callbacks=[CALLBACKS["entropy"](), Copy()]).fit(Automatic(), loader())
    copied, pickled, y = made
    for module in (copied, pickled):
        assert same(list(module.state_dict().values()), y)


def test_every_optimizer_of_a_pair_shows_x() -> None:
    callback = CALLBACKS["entropy"]()
    module = Pair()

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            assert callback._loops is not None
            anchor = {p: x for loop in callback._loops.loops for p, x in zip(loop.params, loop.anchor, strict=True)}
            assert same(list(pl_module.state_dict().values()), [anchor[p] for p in pl_module.parameters()])

    trainer(callbacks=[callback, Look()], max_epochs=2).fit(module, loader())


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_pickle_and_copy(name: str) -> None:
    callback = CALLBACKS[name]()
    assert pickle.loads(pickle.dumps(callback)).relaxation == callback.relaxation
    trainer(callbacks=[callback], max_steps=3).fit(Automatic(), loader())
    assert copy.deepcopy(callback).state_dict().keys() == callback.state_dict().keys()
