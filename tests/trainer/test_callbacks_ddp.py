"""Several processes: all ranks draw the same noise and hold the same weights. Also the script that popen runs again."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_entropy as le
from tests.lightning_modules import (
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

FORK = "ignore:.*multi-threaded, use of fork:DeprecationWarning"
pytestmark = [
    *[pytest.mark.filterwarnings(w) for w in (*LIGHTNING_WARNINGS, FORK)],
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]
linux = pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="fork")


class Report(L.Callback):
    """Save what every rank holds: y in a batch in the middle of a loop, its state dict, and at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == 6:
            torch.save([weights(pl_module), pl_module.state_dict()], self.folder / f"middle-{trainer.global_rank}.pt")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save([weights(pl_module), pl_module.state_dict()], self.folder / f"end-{trainer.global_rank}.pt")


class Unseeded(L.Callback):
    """Every rank has a random state of its own."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        torch.manual_seed(100 + trainer.global_rank)


class Halves(Automatic):
    """Every rank has its own half of the batches."""

    def train_dataloader(self) -> Any:
        return loader(seed=self.trainer.global_rank)


def fit(folder: Path, module: L.LightningModule, *callbacks: L.Callback, strategy: str = "ddp_fork", **kw: Any) -> None:
    t = trainer(folder, devices=2, strategy=strategy, use_distributed_sampler=False,
                callbacks=[Unseeded(), *callbacks, Report(folder)], **kw)  # fmt: skip
    t.fit(module, None if isinstance(module, Halves) else loader())


def reported(folder: Path, when: str) -> tuple[list[Tensor], list[Tensor]]:
    """Give what both ranks have, checked to be equal: parameters and state dict."""
    first, second = (torch.load(folder / f"{when}-{rank}.pt") for rank in (0, 1))
    assert same(first[0], second[0])
    assert same(first[1], second[1])
    return first[0], list(first[1].values())


@linux
@pytest.mark.parametrize("name", ["entropy", "pull", "heat"])
def test_two_ranks_with_the_same_batches_are_one_process_bit_for_bit(tmp_path: Path, name: str) -> None:
    fit(tmp_path, Automatic(), CALLBACKS[name]())
    alone = Automatic()
    trainer(callbacks=[CALLBACKS[name]()]).fit(alone, loader())
    parameters, state = reported(tmp_path, "end")
    assert same(parameters, weights(alone))
    assert same(state, weights(alone))


@linux
@pytest.mark.parametrize("name", ["entropy", "heat"])
def test_ranks_with_other_batches_and_no_seed_stay_equal(tmp_path: Path, name: str) -> None:
    """The noise is rank 0's, whatever the ranks' own random states; in the middle of a loop as at its end."""
    callback = le.EntropySGD(5, 0.5, 0.1) if name == "entropy" else le.HeatSmoothing(3, 100.0)
    module = Halves()
    fit(tmp_path, module, callback)
    y, x = reported(tmp_path, "middle")
    assert not same(y, x)
    parameters, state = reported(tmp_path, "end")
    assert same(parameters, state)
    assert same(weights(module), state)


@linux
@pytest.mark.parametrize("kind", [Manual, Pair])
@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
def test_manual_optimization(tmp_path: Path, kind: Any) -> None:
    strategy = "ddp_fork" if kind is Manual else "ddp_fork_find_unused_parameters_true"
    fit(tmp_path, kind(), CALLBACKS["entropy"](), strategy=strategy)
    y, x = reported(tmp_path, "middle")
    assert not same(y, x)
    reported(tmp_path, "end")


class Refreshed(Halves):
    """Validates."""

    def val_dataloader(self) -> Any:
        return loader(8)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert isinstance(self.net, nn.Sequential)
        torch.save(
            [weights(self), self.net[1].running_mean, self.net[1].running_var],
            Path(self.trainer.default_root_dir) / f"bn-{self.trainer.global_rank}.pt",
        )


@linux
def test_refreshed_batchnorm_is_the_mean_over_ranks(tmp_path: Path) -> None:
    module = Refreshed(net=batchnorm_net())
    fit(tmp_path, module, CALLBACKS["entropy"](), le.RefreshBatchNorm(4), limit_val_batches=1)
    (first, mean, var), second = (torch.load(tmp_path / f"bn-{rank}.pt") for rank in (0, 1))
    assert same([*first, mean, var], [*second[0], *second[1:]])
    nets = []
    for rank in (0, 1):
        net: Any = batchnorm_net()
        with torch.no_grad():
            for p, value in zip(net.parameters(), first, strict=True):
                p.copy_(value)
        torch.optim.swa_utils.update_bn([x for x, _ in loader(seed=rank)][:4], net)
        nets.append(net)
    torch.testing.assert_close(mean, (nets[0][1].running_mean + nets[1][1].running_mean) / 2)
    torch.testing.assert_close(var, (nets[0][1].running_var + nets[1][1].running_var) / 2)


def test_spawn(tmp_path: Path) -> None:
    fit(tmp_path, Halves(), CALLBACKS["entropy"](), strategy="ddp_spawn")
    reported(tmp_path, "end")


@pytest.mark.skipif(sys.platform == "win32", reason="slow to start")
def test_popen(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.trainer.test_callbacks_ddp", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reported(tmp_path, "end")


if __name__ == "__main__":
    fit(Path(sys.argv[1]), Halves(), le.EntropySGD(5, 0.5, 0.1), strategy="ddp")
