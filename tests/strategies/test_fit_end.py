"""Replicas at the edges of a fit: its last loop is closed, finders try the plain optimizer, optimizers are followed."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn

import lightning_entropy as le
from tests.strategies.runs import FORK_WARNINGS, Net, fit, strategy, trainer

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS)]

RELAXATIONS = {
    "parle": le.parle(5, 0.1, 0.3),
    "average": le.parle(5, 0.1, 0.3, elastic_target="average"),
    "elastic_sgd": le.elastic_sgd(5, 0.5),
    "diloco": le.diloco(5),
    "streaming": le.streaming_diloco(5, 2, 3),
    "perturbed": le.Relaxation(inner_steps=5, rho=0.5, width=0.01),
}
STEPS = {"max_epochs": -1, "max_steps": 3}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("format", ["float32", "int8"])
@pytest.mark.parametrize("name", RELAXATIONS)
def test_a_fit_shorter_than_a_loop_ends_with_what_was_trained(tmp_path: Path, name: str, format: Any) -> None:
    before = {k: v.clone() for k, v in Net().state_dict().items()}
    ranks = fit(tmp_path, strategy(RELAXATIONS[name], communication_dtype=format), 2, make=Net, **STEPS)
    assert same(ranks[0]["final"], ranks[1]["final"])
    assert not any(torch.equal(v, before[k]) for k, v in ranks[0]["final"].items())


def test_what_is_left_is_the_mean_of_the_replicas(tmp_path: Path) -> None:
    """Local SGD: x is the mean of y, which Record has seen after every step but the last."""
    ranks = fit(tmp_path / "a", strategy(le.local_sgd(5)), 2, **STEPS)
    plain = fit(tmp_path / "b", strategy(le.local_sgd(5)), 2, max_epochs=-1, max_steps=4)
    means = [(a + b) / 2 for a, b in zip(plain[0]["iterates"][2], plain[1]["iterates"][2], strict=True)]
    for value, mean in zip(ranks[0]["final"].values(), means, strict=True):
        torch.testing.assert_close(value, mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("format", ["float32", "int8"])
@pytest.mark.parametrize("name", RELAXATIONS)
def test_a_resume_goes_on_as_if_it_had_not_been_closed(tmp_path: Path, name: str, format: Any) -> None:
    """Seven batches an epoch, a loop of five."""
    make = lambda: strategy(RELAXATIONS[name], communication_dtype=format)  # noqa: E731
    whole = fit(tmp_path / "whole", make(), 2, max_epochs=2)
    saves = ModelCheckpoint(tmp_path / "first", "end", save_on_train_epoch_end=True)
    fit(tmp_path / "first", make(), 2, callbacks=[saves], max_epochs=1)
    rest = fit(tmp_path / "rest", make(), 2, ckpt_path=tmp_path / "first" / "end.ckpt", max_epochs=2)
    for a, b in zip(whole, rest, strict=True):
        assert same(a["final"], b["final"])


class Noisy(Net):
    """Dropout, whose numbers must be the same after a resume."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(self.net, nn.Dropout(0.3))


@pytest.mark.parametrize("when", ["validation", "epoch"])
def test_dropout_goes_on_exactly(tmp_path: Path, when: str) -> None:
    """From a checkpoint of the validation of an epoch's last batch, and of the epoch's end."""
    whole = fit(tmp_path / "whole", strategy(RELAXATIONS["parle"]), 2, make=Noisy, max_epochs=3, limit_val_batches=1)
    saves = ModelCheckpoint(tmp_path / "ckpt", "{epoch}", save_top_k=-1, save_on_train_epoch_end=when == "epoch")
    options: dict[str, Any] = {"make": Noisy, "limit_val_batches": 1}
    fit(tmp_path / "first", strategy(RELAXATIONS["parle"]), 2, callbacks=[saves], max_epochs=3, **options)
    path = tmp_path / "ckpt" / "epoch=0.ckpt"
    rest = fit(tmp_path / "rest", strategy(RELAXATIONS["parle"]), 2, ckpt_path=path, max_epochs=3, **options)
    for a, b in zip(whole, rest, strict=True):
        assert same(a["final"], b["final"])


class Tuned(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.05


class Later(LearningRateFinder):
    """As Lightning documents it for fine-tuning."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch != 1:
            return
        before, rate = self.everything(trainer, pl_module), trainer.optimizers[0].param_groups[0]["lr"]
        self.lr_find(trainer, pl_module)
        after = self.everything(trainer, pl_module)
        assert str(before) == str(after)
        assert trainer.optimizers[0].param_groups[0]["lr"] == rate

    @staticmethod
    def everything(trainer: Any, pl_module: Any) -> Any:
        """x, y, z, t, momentum and what the module shows."""
        parts = (trainer.strategy._loops.state_dict(), trainer.optimizers[0].state_dict(), dict(pl_module.state_dict()))
        return copy.deepcopy(parts)


@pytest.mark.parametrize("finder", [LearningRateFinder, Later])
def test_a_finder_tries_the_plain_optimizer_and_leaves_no_trace(tmp_path: Path, finder: Any) -> None:
    tries = finder(num_training_steps=20, update_attr=False)
    found = fit(tmp_path / "a", strategy(RELAXATIONS["parle"]), 2, make=Tuned, callbacks=[tries], max_epochs=3)
    assert all(torch.isfinite(v).all() for v in found[0]["final"].values())
    assert same(found[0]["final"], found[1]["final"])


class Exchanges(Net):
    """Another optimizer from the second epoch on."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers = [torch.optim.Adam(self.parameters(), 0.05)]


def test_an_exchanged_optimizer_is_followed(tmp_path: Path) -> None:
    ranks = fit(tmp_path / "a", strategy(RELAXATIONS["parle"]), 2, make=Exchanges, max_epochs=3)
    short = fit(tmp_path / "b", strategy(RELAXATIONS["parle"]), 2, make=Exchanges, max_epochs=1)
    assert same(ranks[0]["final"], ranks[1]["final"])
    assert not any(torch.equal(v, short[0]["final"][k]) for k, v in ranks[0]["final"].items())


class Positive(Net):
    """Weights that are clamped after every batch."""

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(min=0)


@pytest.mark.parametrize("name", RELAXATIONS)
def test_a_constraint_holds_for_the_consensus(tmp_path: Path, name: str) -> None:
    ranks = fit(tmp_path, strategy(RELAXATIONS[name]), 2, make=Positive, max_epochs=2, limit_val_batches=1)
    assert all((v >= 0).all() for rank in ranks for v in rank["final"].values())


def test_a_resume_with_something_changed_says_so(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "end", save_on_train_epoch_end=True)
    fit(tmp_path, strategy(le.parle(5, 0.1, 0.3)), 2, callbacks=[saves], max_epochs=1)
    t = trainer(tmp_path, strategy(le.parle(4, 0.1, 0.3), communication_dtype="int8"), 2, max_epochs=2)
    with pytest.raises(Exception, match="inner_steps was 5, is 4; communication_dtype was float32, is int8"):
        t.fit(Net(), ckpt_path=tmp_path / "end.ckpt")  # a warning is an error in here
