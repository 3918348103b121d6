"""How long a training is, for settings that are a share of it."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_entropy as le
from tests.lightning_modules import LIGHTNING_WARNINGS, Automatic, Manual, loader, trainer

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]

LATE = le.Relaxation(inner_steps=2, width=le.Starting(0.1, at=0.5), scale="relative")


class Widths(L.Callback):
    """The width in force at every step."""

    def __init__(self, owner: le.InnerOuterCallback) -> None:
        self.owner, self.seen = owner, list[float]()

    def on_before_optimizer_step(self, *_: Any) -> None:
        assert self.owner._loops is not None
        self.seen.append(self.owner._loops.loops[0].settings.width)


def widths(relaxation: le.Relaxation, module: L.LightningModule, ckpt_path: Any = None, **options: Any) -> list[float]:
    owner = le.InnerOuterCallback(relaxation, seed=3)
    seen = Widths(owner)
    trainer(callbacks=[owner, seen], **options).fit(module, loader(), ckpt_path=ckpt_path)
    return seen.seen


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 12, "max_epochs": -1},
        {"max_epochs": 2, "limit_train_batches": 6},
        {"max_epochs": 4, "limit_train_batches": 6, "accumulate_grad_batches": 2},
    ],
)
def test_a_share_is_one_of_the_optimizers_steps(options: dict[str, Any]) -> None:
    """Of twelve: off for six, three loops of two."""
    seen = widths(LATE, Automatic(), **options)
    assert len(set(seen[: len(seen) // 2])) == 1 and seen[0] == 0.0
    assert set(seen[len(seen) // 2 :]) == {0.1}


def test_before_its_start_a_method_is_the_plain_optimizer() -> None:
    ends = []
    for callbacks in ([], [le.InnerOuterCallback(le.Relaxation(outer_lr=le.Starting(0.5, at=0.99, before=1.0)))]):
        torch.manual_seed(0)
        module = Automatic()
        trainer(callbacks=callbacks, max_steps=6).fit(module, loader())
        ends.append([p.detach().clone() for p in module.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_without_an_end_or_with_manual_optimization_a_share_is_refused() -> None:
    no_end = (
        r"width must count outer steps without max_steps or max_epochs, .*, got a share of the training in Starting\("
    )
    with pytest.raises(MisconfigurationException, match=no_end):
        widths(LATE, Automatic(), max_epochs=-1)
    with pytest.raises(MisconfigurationException, match="width must count outer steps in manual optimization"):
        widths(LATE, Manual(), max_steps=6)


def test_elsewhere_too() -> None:
    w = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"width must count outer steps here, .*, got a share of it in Starting\("):
        le.relax(torch.optim.SGD([w], lr=0.1), LATE)


def test_a_pull_is_logged_as_its_stiffness() -> None:
    logged: list[dict[str, float]] = []

    class Logger(L.pytorch.loggers.logger.DummyLogger):
        def log_metrics(self, metrics: Any, *_: Any, **__: Any) -> None:
            logged.append(metrics)

    owner = le.HamiltonJacobi(2, le.Pull(0.5))
    trainer(callbacks=[owner], max_steps=4, logger=Logger(), log_every_n_steps=1).fit(Automatic(), loader())
    ours = [m for m in logged if "entropy/outer_step" in m]
    assert ours and all("entropy/gamma" not in m for m in ours)
    assert ours[-1]["entropy/stiffness"] == le.Pull(0.5).stiffness(0, inner_steps=2)
