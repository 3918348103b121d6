"""What a user writes into the weights while a callback drives the loop, and when: it is the new x, or an error."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

import lightning_entropy as le
from tests.lightning_modules import (
    CALLBACKS,
    LIGHTNING_WARNINGS,
    Automatic,
    Manual,
    Stream,
    loader,
    same,
    trainer,
    weights,
)

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]


class At(L.Callback):
    """Do something once, in one hook, at one step."""

    def __init__(self, hook: str, step: int, do: Any) -> None:
        def once(trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == step and not self.done:
                self.done = True
                do(pl_module)

        self.done = False
        setattr(self, hook, once)


def sevens(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.full_like(value, 7.0) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("method", CALLBACKS)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_after_backward"])
def test_what_is_loaded_is_the_new_x(method: str, hook: str) -> None:
    """Between batches, or in one: as in a target network's update. The whole module, or a part."""
    seen: list[Any] = []

    def load(module: Any) -> None:
        inner = weights(module.net[2])
        module.net[0].load_state_dict(sevens(module.net[0]))
        seen.append(copy.deepcopy(module.net.state_dict()))
        assert same(weights(module.net[2]), inner), "y of the others stays"
        module.load_state_dict(sevens(module))
        seen.append(copy.deepcopy(module.state_dict()))

    at = At(hook, 4 if hook == "on_train_batch_end" else 3, load)
    trainer(callbacks=[CALLBACKS[method](), at], max_steps=4).fit(Automatic(), loader())
    assert at.done
    part, whole = seen
    assert all((part[f"0.{name}"] == 7).all() for name in ("weight", "bias"))
    assert not (part["2.weight"] == 7).any()
    assert all((value == 7).all() for value in whole.values())


@pytest.mark.parametrize("method", CALLBACKS)
def test_what_is_loaded_last_is_what_fit_leaves(method: str) -> None:
    at = At("on_train_batch_end", 4, lambda module: module.load_state_dict(sevens(module)))
    module = Automatic()
    trainer(callbacks=[CALLBACKS[method](), at], max_steps=4).fit(module, loader())
    assert all((w == 7).all() for w in weights(module))


@pytest.mark.parametrize("make", [Automatic, Manual])
def test_weights_clipped_after_a_batch_stay_clipped(make: type[Automatic]) -> None:
    """As a Wasserstein critic's are."""

    class Clips(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.clamp_(-0.1, 0.1)

    for inner_steps in (1, 3):
        module = make()
        trainer(callbacks=[le.HeatSmoothing(inner_steps, 100.0), Clips()], accumulate_grad_batches=1).fit(
            module, loader()
        )
        assert max(w.abs().max() for w in weights(module)) == pytest.approx(0.1)


@pytest.mark.parametrize("make", [Automatic, Manual])
def test_a_write_that_would_be_lost_is_an_error_that_leaves_x(make: type[Automatic]) -> None:
    def clip(module: Any) -> None:
        with torch.no_grad():
            for p in module.parameters():
                p.clamp_(-0.1, 0.1)

    plain, module = make(), make()
    trainer(callbacks=[le.HeatSmoothing(1, 100.0, seed=1)], max_steps=2).fit(plain, loader())
    written = At("on_train_batch_start", 2, clip)
    with pytest.raises(RuntimeError, match="weights were modified while they were perturbed"):
        trainer(callbacks=[le.HeatSmoothing(1, 100.0, seed=1), written]).fit(module, loader())
    assert same(plain, module)


@pytest.mark.filterwarnings("ignore:net.0.weight were written while")
def test_a_layer_frozen_and_edited_after_it_was_trained_keeps_the_edit() -> None:
    class Freezes(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.net[0].weight.requires_grad_(False).fill_(0.25)

    for method in CALLBACKS.values():
        module = Automatic()
        t = trainer(callbacks=[method(), Freezes()], val_check_interval=7, limit_val_batches=1)
        t.fit(module, loader(), loader(4))
        assert (module.net[0].weight == 0.25).all()


@pytest.mark.filterwarnings("ignore:net.0.weight were written while")
@pytest.mark.parametrize("method", CALLBACKS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_an_edit_while_x_is_shown_is_in_the_checkpoint(tmp_path: Path, method: str, precision: Any) -> None:
    """Scaled after validation in the middle of a loop, and saved then: a resumed run ends as the first one."""

    class Doubles(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.global_step == 7:
                with torch.no_grad():
                    pl_module.net[0].weight.mul_(2)

    def fit(**kwargs: Any) -> Automatic:
        module = Automatic()
        saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
        t = trainer(
            callbacks=[CALLBACKS[method](), Doubles(), saves], val_check_interval=7, limit_val_batches=1,
            enable_checkpointing=True, precision=precision,
        )  # fmt: skip
        t.fit(module, Stream(), loader(4), **kwargs)
        return module

    whole = fit()
    assert same(whole, fit(ckpt_path=tmp_path / "step=7.ckpt", weights_only=False))


@pytest.mark.parametrize("method", ["entropy", "jacobi", "heat"])
def test_no_memory_to_show_x_leaves_x(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of y is made parameter by parameter; an error in the middle leaves no mixture."""
    seen: list[list[Tensor]] = []

    class Runs(L.Callback):
        """Out of memory at the second copy, then and when the exception is looked after."""

        def on_validation_start(self, *_: Any) -> None:
            raise AssertionError("is behind the callback")

    clone, count = Tensor.clone, 0

    def failing(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal count
        count += 1
        if count % 2 == 0:
            raise torch.OutOfMemoryError("no memory")
        return clone(self, *args, **kwargs)

    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 7:
                seen.append([v.detach().clone() for v in pl_module.state_dict().values()])
                monkeypatch.setattr(Tensor, "clone", failing)

    module = Automatic()
    t = trainer(callbacks=[CALLBACKS[method](), Fails(), Runs()], val_check_interval=7, limit_val_batches=1)
    with pytest.raises((torch.OutOfMemoryError, AssertionError)):
        t.fit(module, loader(), loader(4))
    monkeypatch.undo()
    assert same(weights(module), seen[0])


def test_parameters_that_share_memory_keep_y(tmp_path: Path) -> None:
    module = Automatic(net=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)))
    module.net[1].weight.data = module.net[0].weight.data
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loop = le.relax(optimizer, le.hamilton_jacobi(5, 0.5))
    for batch in list(loader())[:3]:
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    before = weights(module)
    with loop.at_anchor():
        pass
    assert same(weights(module), before)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part() -> None:
    module = Automatic()
    module.net = torch.jit.script(module.net)
    callback = CALLBACKS["entropy"]()
    seen: list[bool] = []

    def look(_: Any) -> None:
        assert callback._loops is not None
        anchors = callback._loops.loops[0].anchor
        seen.append(same(list(module.state_dict().values()), anchors))

    trainer(callbacks=[callback, At("on_train_batch_end", 3, look)], max_steps=3).fit(module, loader())
    assert seen == [True]


@pytest.mark.parametrize("method", ["entropy", "jacobi", "heat"])
def test_a_layer_put_in_the_place_of_another(method: str) -> None:
    """With the optimizer told so: its noise and its state dict are as any other's."""
    callback = CALLBACKS[method]()
    seen: list[bool] = []

    def replace(module: Any) -> None:
        old, module.net[2] = module.net[2], nn.Linear(6, 3)
        group = module.optimizers().param_groups[0]
        group["params"][2:] = list(module.net[2].parameters())
        for p in old.parameters():
            module.optimizers().state.pop(p, None)

    def look(module: Any) -> None:
        assert callback._loops is not None
        anchors = callback._loops.loops[0].anchor
        seen.append(same(list(module.state_dict().values()), anchors))

    t = trainer(callbacks=[callback, At("on_train_epoch_end", 12, replace), At("on_train_batch_end", 14, look)],
                max_epochs=2)  # fmt: skip
    t.fit(Automatic(), loader())
    assert seen == [True]


def test_a_schedule_of_exact_length_is_read_no_further(tmp_path: Path) -> None:
    gammas = [100.0, 90.0, 80.0]
    callback = le.HeatSmoothing(4, gammas.__getitem__)
    t = trainer(callbacks=[callback])
    t.fit(Automatic(), loader())
    assert callback.state_dict()["loops"][0]["outer_step"] == 3
    t.save_checkpoint(tmp_path / "end.ckpt")
    trainer(callbacks=[le.HeatSmoothing(4, gammas.__getitem__)]).fit(
        Automatic(), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=False
    )


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules() -> None:
    for method in CALLBACKS.values():
        module = Automatic(net=nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(3)))
        trainer(callbacks=[method()]).fit(module, loader())
        assert all(w.isfinite().all() for w in weights(module))


def test_keep_vars_gives_the_parameters() -> None:
    def look(module: Any) -> None:
        state = module.state_dict(keep_vars=True)
        assert all(state[name] is p for name, p in module.named_parameters())

    at = At("on_train_batch_end", 3, look)
    trainer(callbacks=[CALLBACKS["entropy"](), at], max_steps=3).fit(Automatic(), loader())
    assert at.done


class Watched(Automatic):
    def __init__(self, plateau: bool) -> None:
        super().__init__()
        self.plateau = plateau

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if not self.plateau:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def test_two_validations_of_one_x_are_said_where_somebody_counts_them() -> None:
    def fit(callback: le.InnerOuterCallback, plateau: bool = False, stopping: bool = True) -> None:
        callbacks: list[L.Callback] = [callback, *([EarlyStopping("val_loss", patience=9)] if stopping else [])]
        t = trainer(callbacks=callbacks, val_check_interval=3, limit_val_batches=1)
        t.fit(Watched(plateau), loader(), loader(4))

    with pytest.warns(
        UserWarning, match="two validations had the same weights, as no outer step of 5 training"
    ) as said:
        fit(CALLBACKS["jacobi"]())
    assert sum("two validations" in str(w.message) for w in said) == 1
    with pytest.warns(UserWarning, match="which ReduceLROnPlateau may take for no improvement"):
        fit(CALLBACKS["jacobi"](), plateau=True, stopping=False)
    fit(CALLBACKS["jacobi"](), stopping=False)
    fit(le.HamiltonJacobi(3))
    fit(CALLBACKS["heat"]())


def test_no_optimizer_at_all() -> None:
    class Bare(Manual):
        def configure_optimizers(self) -> Any:
            return []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    trainer(callbacks=[CALLBACKS["entropy"]()]).fit(Bare(), loader())


def test_a_start_that_fails_leaves_no_hook() -> None:
    """At the second optimizer."""

    class Two(Manual):
        def configure_optimizers(self) -> Any:
            first, second = self.net[0].parameters(), self.net[2].parameters()
            return [torch.optim.SGD(first, lr=0.1), torch.optim.LBFGS(second)]

    module = Two()
    made = module.configure_optimizers()
    module.configure_optimizers = lambda: made  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(ValueError, match="coupled must be False with LBFGS"):
            trainer(callbacks=[CALLBACKS["coupled"]()]).fit(module, loader())
    assert not made[0]._optimizer_step_pre_hooks


def test_arguments_of_another_type() -> None:
    for value in ("no", None, 1):
        with pytest.raises(TypeError, match="compile must be True or False, got"):
            le.EntropySGD(compile=value)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="compile must be True or False, got"):
            le.relax(torch.optim.SGD([nn.Parameter(torch.ones(1))]), le.lookahead(), compile=value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"forward must be a callable of \(module, batch\), got 3"):
        le.RefreshBatchNorm(forward=3)  # type: ignore[arg-type]


class Words(L.LightningModule):
    """An embedding that its forward pass writes into."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words = batch[1] % 5
        return nn.functional.cross_entropy(self.head(self.table(words)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_an_embedding_that_keeps_a_norm() -> None:
    for method in CALLBACKS.values():
        module = Words()
        trainer(callbacks=[method()]).fit(module, loader())
        assert all(w.isfinite().all() for w in weights(module))


@pytest.mark.parametrize("method", ["entropy", "jacobi", "heat"])
def test_a_part_that_joins_the_optimizer_later_is_loaded(method: str) -> None:
    """As BackboneFinetuning has it."""

    class Later(Automatic):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[2].parameters(), lr=0.1, momentum=0.9)

    def join(module: Any) -> None:
        module.optimizers().add_param_group({"params": list(module.net[0].parameters())})

    def load(module: Any) -> None:
        module.net[0].load_state_dict(sevens(module.net[0]))
        assert all((value == 7).all() for value in module.net[0].state_dict().values())

    module, loads = Later(), At("on_train_batch_end", 4, load)
    t = trainer(callbacks=[CALLBACKS[method](), At("on_train_batch_end", 1, join), loads], max_steps=4)
    t.fit(module, loader())
    assert loads.done
    assert all((w == 7).all() for w in weights(module.net[0]))
