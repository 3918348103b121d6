"""BatchNorm statistics at the weights one evaluates: right, and without a trace in training."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, RandomSampler

import lightning_entropy as le
from tests.lightning_modules import (
    BATCHES,
    CALLBACKS,
    LIGHTNING_WARNINGS,
    Automatic,
    Stream,
    batchnorm_net,
    data,
    loader,
    same,
    trainer,
    weights,
)

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]


def net(dropout: float = 0.5) -> Automatic:
    return Automatic(net=batchnorm_net(dropout))


def buffers(module: nn.Module) -> list[Tensor]:
    return [b.clone() for b in module.buffers()]


def expected(module: Automatic, batches: Any) -> list[Tensor]:
    """What torch's own function gives, with dropout off."""
    twin = copy.deepcopy(module.net)
    twin[3].p = 0.0  # type: ignore[index]
    update_bn(batches, twin)
    return buffers(twin)


@pytest.mark.parametrize("n", [3, 64])
def test_a_test_on_its_own_is_at_the_statistics_of_update_bn(n: int) -> None:
    module = net()
    before = weights(module)
    trainer(callbacks=[le.RefreshBatchNorm(n, dataloader=loader())]).test(module, loader(8), verbose=False)
    assert same(buffers(module), expected(module, [x for x, _ in loader()][:n]))
    assert same(weights(module), before)
    assert module.net[1].momentum == 0.1  # type: ignore[index]
    assert int(module.net[1].num_batches_tracked) == min(n, BATCHES)  # type: ignore[index, arg-type]
    trainer().fit(module, loader())  # nothing made in inference mode is left behind


def test_validation_is_at_x_with_the_statistics_of_x(tmp_path: Path) -> None:
    """And so are the checkpoints that follow; the sanity check before training refreshes nothing."""
    seen: list[list[Tensor]] = []

    class Look(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            assert not any(m.training for m in pl_module.modules())
            if trainer.sanity_checking:
                assert int(pl_module.net[1].num_batches_tracked) == 0
                return
            seen.append(buffers(pl_module))
            assert same(seen[-1], expected(pl_module, [x for x, _ in loader()][:4]))

    keep = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    callbacks = [le.RefreshBatchNorm(4), CALLBACKS["entropy"](), Look(), keep]
    t = trainer(tmp_path, callbacks=callbacks, max_epochs=2, val_check_interval=7, limit_val_batches=1,
                enable_checkpointing=True, num_sanity_val_steps=1)  # fmt: skip
    t.fit(net(0.0), loader(), loader(8))
    files = list(tmp_path.glob("*.ckpt"))
    assert len(seen) == len(files) == 2
    for file in files:
        state = torch.load(file)["state_dict"]
        stored = [v for k, v in state.items() if "running" in k or "tracked" in k]
        assert any(same(stored, s) for s in seen)


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: loader(),
    "shuffled": lambda: loader(shuffle=True),
    "generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(1)),
    "sampler": lambda: loader(sampler=RandomSampler(data(), generator=torch.Generator().manual_seed(1))),
    "persistent": lambda: loader(
        shuffle=True, num_workers=1, persistent_workers=True, generator=torch.Generator().manual_seed(1)
    ),
    "position": lambda: Stream(),
    "several": lambda: {
        "a": loader(shuffle=True, generator=torch.Generator().manual_seed(1)),
        "b": loader(shuffle=True, generator=torch.Generator().manual_seed(2), num_workers=1, persistent_workers=True),
    },
}


class Noted(Automatic):
    """Writes down its batches; uses every global random generator."""

    def __init__(self) -> None:
        super().__init__(net=batchnorm_net(0.5))
        self.batches: list[Tensor] = []

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch["a"][0] if isinstance(batch, dict) else batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        both = [batch["a"], batch["b"]] if isinstance(batch, dict) else [batch]
        self.batches.extend(x.clone() for x, _ in both)
        x = both[0][0] + 0.01 * torch.randn(1) + 0.01 * float(np.random.rand())
        return super().loss([x, both[0][1]])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


@pytest.mark.parametrize("kind", LOADERS)
def test_training_is_the_same_with_and_without(kind: str) -> None:
    """Weights, batches and random numbers, bit for bit, with refreshes in the middle of an epoch."""
    runs: list[Noted] = []
    for more in ([], [le.RefreshBatchNorm(3)]):
        L.seed_everything(0, verbose=False)
        module = Noted()
        t = trainer(callbacks=[CALLBACKS["entropy"](), *more], max_epochs=2, val_check_interval=5, limit_val_batches=1)
        t.fit(module, LOADERS[kind](), loader(8))
        runs.append(module)
    assert same(runs[0].batches, runs[1].batches)
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(buffers(runs[0]), buffers(runs[1]))


def test_an_exception_in_the_middle_leaves_the_old_statistics_and_modes() -> None:
    class Failing(Automatic):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise KeyError("third")
            return self.net(x)

    module = Failing(net=batchnorm_net())
    module.net[1].running_mean.fill_(3.0)  # type: ignore[index, operator, union-attr]
    module.train()
    old, modes = buffers(module), [m.training for m in module.modules()]
    t = trainer()
    t.strategy._lightning_module = module
    with pytest.raises(KeyError):
        le.RefreshBatchNorm(5, dataloader=loader()).refresh(t, module)
    assert same(buffers(module), old)
    assert module.net[1].momentum == 0.1  # type: ignore[index]
    assert [m.training for m in module.modules()] == modes


def test_by_hand_and_with_the_module_in_training_mode() -> None:
    """Dropout in front of a layer is off while its statistics are collected, and on again afterwards."""
    module = Automatic(net=nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    t = trainer()
    t.strategy._lightning_module = module
    le.RefreshBatchNorm(5, dataloader=loader()).refresh(t, module)
    twin = nn.BatchNorm1d(4)
    update_bn([x for x, _ in loader()][:5], twin)
    assert same(buffers(module), buffers(twin))
    assert all(m.training for m in module.modules())


def test_layers_that_training_reads_and_layers_that_nobody_runs_keep_their_statistics() -> None:
    class Frozen(Automatic):
        def __init__(self) -> None:
            super().__init__(net=nn.Sequential(batchnorm_net(), nn.BatchNorm1d(3)))
            self.unused = nn.BatchNorm1d(3)

        def on_train_epoch_start(self) -> None:
            self.net[1].eval()  # type: ignore[index]

    module = Frozen()
    for layer in (module.net[1], module.unused):  # type: ignore[index]
        layer.running_mean.fill_(0.3)  # type: ignore[union-attr, operator]
    kept = buffers(module.net[1]) + buffers(module.unused)  # type: ignore[index]
    t = trainer(callbacks=[le.RefreshBatchNorm(3)], val_check_interval=5, limit_val_batches=1)
    t.fit(module, loader(), loader(8))
    assert same(buffers(module.net[1]) + buffers(module.unused), kept)  # type: ignore[index]
    plain = Frozen()
    for layer in (plain.net[1], plain.unused):  # type: ignore[index]
        layer.running_mean.fill_(0.3)  # type: ignore[union-attr, operator]
    trainer().fit(plain, loader())
    assert same(weights(module), weights(plain))


def test_batches_go_through_the_modules_own_transfer_hooks() -> None:
    class Shifted(Automatic):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 2, batch[1]]

    module = Shifted(net=batchnorm_net())
    trainer(callbacks=[le.RefreshBatchNorm(3, dataloader=loader())]).test(module, loader(8), verbose=False)
    assert same(buffers(module), expected(module, [(x + 1) * 2 for x, _ in loader()][:3]))


def test_where_the_batches_come_from() -> None:
    class Own(Automatic):
        def train_dataloader(self) -> Any:
            return loader()

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(seed=5)

        def test_dataloader(self) -> Any:
            return loader(8)

    module = Own(net=batchnorm_net())
    trainer(callbacks=[le.RefreshBatchNorm(3)]).test(module, loader(8), verbose=False)
    assert same(buffers(module), expected(module, [x for x, _ in loader()][:3]))
    trainer(callbacks=[le.RefreshBatchNorm(3)]).test(module, datamodule=Data(), verbose=False)
    assert same(buffers(module), expected(module, [x for x, _ in loader(seed=5)][:3]))
    with pytest.raises(MisconfigurationException, match="needs training batches"):
        trainer(callbacks=[le.RefreshBatchNorm(3)]).test(net(), loader(8), verbose=False)
    with pytest.raises(MisconfigurationException, match="at least one batch"):
        trainer(callbacks=[le.RefreshBatchNorm(3, dataloader=DataLoader(data(0)))]).test(
            net(), loader(8), verbose=False
        )


def whole_batch(module: L.LightningModule, batch: Any) -> Any:
    return module(batch[0] * 2)


def test_a_forward_of_ones_own() -> None:
    module = net()
    refresh = le.RefreshBatchNorm(3, dataloader=loader(), forward=whole_batch)
    trainer(callbacks=[refresh]).test(module, loader(8), verbose=False)
    assert same(buffers(module), expected(module, [x * 2 for x, _ in loader()][:3]))


def test_a_net_without_batchnorm_draws_no_batch_and_says_so() -> None:
    class Never:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("drawn")

    with pytest.warns(UserWarning, match="RefreshBatchNorm has nothing to do: no layer of this module"):
        trainer(callbacks=[le.RefreshBatchNorm(dataloader=Never())]).test(Automatic(), loader(8), verbose=False)


def test_after_weight_averaging_it_refreshes_the_average() -> None:
    """Listed behind another callback that evaluates other weights, it sees those weights."""

    class Look(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            assert same(buffers(pl_module), expected(pl_module, [x for x, _ in loader()][:4]))

    callbacks = [EMAWeightAveraging(decay=0.8), le.RefreshBatchNorm(4), Look()]
    t = trainer(callbacks=callbacks, max_epochs=2, limit_val_batches=1)
    t.fit(net(0.0), loader(), loader(8))


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_arguments(n: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="n_batches must be an int >= 1"):
        le.RefreshBatchNorm(n)
