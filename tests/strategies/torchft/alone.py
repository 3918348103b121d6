"""A replica whose meetings are with nobody, over at once, and lost if one likes."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.strategies.options import Grid
from lightning_entropy.strategies.replica import ReplicaLoops
from lightning_entropy.strategies.torchft.assembly import Assembly
from lightning_entropy.strategies.torchft.records import Met, Record


class Round:
    """A meeting of this replica alone, which is over at once; None: a peer was lost in it."""

    arrived = True

    def __init__(self, met: Met | None) -> None:
        self.met = met

    def wait(self) -> Met | None:
        return self.met


class Alone:
    """Counts the meetings that are asked for.

    Attributes:
        loses: every meeting from now on.
    """

    present = (0,)
    loses = False
    speaks = single = True

    def __init__(self) -> None:
        self.asked = 0

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        return list(flags)

    def exchange(
        self, payload: Tensor, *, ready: Any, stream: int, version: int, common: Callable[[], Any], rounding: Any
    ) -> Round:
        self.asked += 1
        if self.loses:
            return Round(None)
        record = Record(0, False, stream, payload.numel(), False, "float32", 0, 0, version, self.asked, "", 0)
        return Round(Met([record], 0, payload))


class Replica:
    def __init__(self, relaxation: le.Relaxation) -> None:
        torch.manual_seed(0)
        self.module, self.assembly = torch.nn.Linear(3, 2), Alone()
        self.optimizer = torch.optim.SGD(self.module.parameters(), 0.1)
        self.loops = ReplicaLoops(
            self.module,
            [self.optimizer],
            relaxation,
            Grid(0, 1, 1),
            outer=None,
            seed=0,
            communication_dtype="float32",
            overlap=True,
            apart=False,
            timeout=None,
            meeting=cast(Any, None),
            assembly=cast(Assembly, self.assembly),
        )

    def train(self, steps: int) -> int:
        """Train; return the number of meetings that it has taken."""
        before = self.assembly.asked
        for _ in range(steps):
            self.loops.begin()
            self.optimizer.zero_grad()
            self.module(torch.ones(1, 3)).sum().backward()
            self.optimizer.step()
            self.loops.count(self.optimizer)
        return self.assembly.asked - before

    def show(self) -> None:
        """Show the consensus, as for a validation or a checkpoint."""
        self.loops.consensus.show(alone=False)
        self.loops.consensus.hide()
