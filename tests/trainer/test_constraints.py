"""Constraints that are put back after every step hold for the weights that are validated and kept."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import lightning_entropy as le
from tests.lightning_modules import CALLBACKS, LIGHTNING_WARNINGS, Automatic, loader, trainer, weights

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]

METHODS = {
    **CALLBACKS,
    "lookahead": lambda: le.InnerOuterCallback(le.lookahead(3, 0.5)),
    "overshooting": lambda: le.InnerOuterCallback(le.lookahead(3, 1.5)),
    "outer momentum": lambda: le.InnerOuterCallback(le.diloco(3, 0.7, 0.9)),
    "heat3": lambda: le.HeatSmoothing(3, 1e4, seed=3),
    "perturbed chain": lambda: le.InnerOuterCallback(le.Relaxation(inner_steps=3, width=0.01, average=0.5), seed=3),
}


def clamp(module: Any) -> None:
    with torch.no_grad():
        module.net[0].weight.clamp_(min=0)


def normalise(module: Any) -> None:
    with torch.no_grad():
        weight = module.net[0].weight
        weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True))


def obeys(what: Any, weight: Tensor) -> bool:
    if what is clamp:
        return bool((weight >= 0).all())
    return torch.allclose(torch.linalg.vector_norm(weight, dim=1), torch.ones(len(weight)), atol=1e-6)


class Constrained(Automatic):
    """Puts the constraint back where it is told to, and looks at every validation."""

    def __init__(self, what: Any, where: str) -> None:
        super().__init__(lr=0.3)
        self.what, self.where, self.bad = what, where, 0
        self.automatic_optimization = not where.startswith("manual")
        what(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer: Any = self.optimizers()
        for _ in range(2 if self.where == "manual twice" else 1):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.what(self)
        return None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.where == "optimizer_step":
            self.what(self)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.where == "module":
            self.what(self)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.bad += not obeys(self.what, self.net[0].weight)  # type: ignore[index]


class Puts(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.what(pl_module)


@pytest.mark.parametrize("what", [clamp, normalise])
@pytest.mark.parametrize("where", ["module", "callback", "optimizer_step", "manual", "manual twice"])
@pytest.mark.parametrize("name", METHODS)
def test_weights_that_are_validated_and_kept_obey(name: str, where: str, what: Any) -> None:
    if name == "two_timescale" and what is normalise:
        what = clamp  # y is never put back to x there, which is between points of a sphere: convex constraints hold
    module = Constrained(what, where)
    others = [Puts()] if where == "callback" else []
    t = trainer(callbacks=[METHODS[name](), *others], max_epochs=2, val_check_interval=4, limit_val_batches=1)
    before = weights(module)
    t.fit(module, loader(), loader(4))
    assert not module.bad
    assert obeys(what, module.net[0].weight)  # type: ignore[index]
    assert not torch.equal(before[1], weights(module)[1])
