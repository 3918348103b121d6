"""Whatever a Trainer can do, replicas do: two that see the same batches are one process with the callback, bit for bit.

The mean of two equal numbers is that number, so a method without noise has nothing to add to what each of them does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_entropy as le
from tests.lightning_modules import LIGHTNING_WARNINGS, Automatic, Manual, Pair, loader
from tests.strategies.runs import FORK_WARNINGS, fit, strategy

pytestmark = [pytest.mark.processes, *(pytest.mark.filterwarnings(w) for w in (*FORK_WARNINGS, *LIGHTNING_WARNINGS))]


class Scheduled(Automatic):
    """The learning rate halves every third step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Compiled(Automatic):
    """A net compiled by its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager")


@dataclass(frozen=True)
class Feature:
    """A module and what the Trainer is told."""

    make: Callable[[], L.LightningModule] = Automatic
    trainer: dict[str, Any] = field(default_factory=dict)


FEATURES = {
    "automatic": Feature(),
    "manual": Feature(Manual),
    "two optimizers": Feature(Pair),
    "adamw": Feature(lambda: Automatic("adamw", lr=0.01)),
    "accumulation": Feature(trainer={"accumulate_grad_batches": 3}),
    "clipping": Feature(trainer={"gradient_clip_val": 0.05}),
    "bfloat16": Feature(trainer={"precision": "bf16-mixed"}),
    "schedule": Feature(Scheduled),
    "compile": Feature(Compiled),
}


@pytest.mark.parametrize("relaxation", [le.parle(4, 0.1, 0.5), le.diloco(4)], ids=["parle", "diloco"])
@pytest.mark.parametrize("name", FEATURES)
def test_equal_replicas_are_one_process_with_the_callback(tmp_path: Path, name: str, relaxation: le.Relaxation) -> None:
    feature = FEATURES[name]

    def train(folder: str, strategy: Any, devices: int, *callbacks: L.Callback) -> list[dict[str, Any]]:
        module = feature.make()
        module.train_dataloader = loader
        return fit(
            tmp_path / folder,
            strategy,
            devices,
            module=module,
            callbacks=list(callbacks),
            use_distributed_sampler=False,
            **feature.trainer,
        )

    one = train("one", "auto", 1, le.InnerOuterCallback(relaxation))[0]
    for rank in train("two", strategy(relaxation, replicas=2), 2):
        assert len(rank["iterates"]) == len(one["iterates"]) == 24
        for ours, theirs in zip(rank["iterates"], one["iterates"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        torch.testing.assert_close(rank["final"], one["final"], rtol=0, atol=0)
    assert not torch.equal(one["iterates"][0][0], one["iterates"][-1][0])
