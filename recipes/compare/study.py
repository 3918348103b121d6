"""Choose every method's rate and decay by the same search, then repeat over seeds; finished trainings are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recipes.compare import trainings
from recipes.compare.budget import Kind
from recipes.compare.methods import Method
from recipes.compare.run import Run, Task, execute


class Setting(NamedTuple):
    """What the search chooses: SGD's learning rate, and its weight decay if it is not the task's."""

    lr: float
    weight_decay: float | None = None


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        task: what the methods share.
        methods: their labels.
        lrs: the learning rates that each method tries.
        weight_decays: that it tries with each of them; None is the task's. Every pair is tried once, with seed 0, and
            that of least held-out error at the end is the method's own.
        seeds: trainings of each method at its learning rate, seeds 0, 1, ...
        budgets: kinds of budget; ``steps`` is for the replicated methods alone.
        out: folder for results.
        workers: trainings at a time, each a process; 0 trains in this process.
    """

    task: Task
    methods: Sequence[str]
    lrs: Sequence[float]
    seeds: int
    out: Path
    budgets: Sequence[Kind] = ("compute",)
    workers: int = 1
    weight_decays: Sequence[float | None] = (None,)

    def __post_init__(self) -> None:
        if not self.lrs:
            raise ValueError("lrs must hold a learning rate, got none")
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {self.seeds}")
        for name in ("methods", "lrs", "weight_decays", "budgets"):
            values = list(getattr(self, name))
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones, got {values}")
        for label in self.methods:
            Method.parse(label)
        if not self.arms():
            raise ValueError(f"budgets must hold compute where no method has replicas, got {list(self.budgets)}")

    def arms(self) -> list[tuple[str, Kind]]:
        """List what is compared: every method in every budget in which it differs from the others."""
        return [
            (label, kind)
            for kind in self.budgets
            for label in self.methods
            if kind == "compute" or Method.parse(label).replicas > 1
        ]

    def settings(self) -> list[Setting]:
        """List what every method tries."""
        return [Setting(lr, decay) for lr in self.lrs for decay in self.weight_decays]

    def search_runs(self) -> list[Run]:
        """List the trainings that choose the settings."""
        if len(self.settings()) == 1:
            return []
        return [
            Run(self.task, label, setting.lr, 0, kind, setting.weight_decay)
            for label, kind in self.arms()
            for setting in self.settings()
        ]

    def final_runs(self, records: Sequence[dict[str, Any]]) -> list[Run]:
        """List the trainings that are compared, given the records of the search."""
        chosen = self.chosen(records)
        return [
            Run(self.task, label, chosen[label, kind].lr, seed, kind, chosen[label, kind].weight_decay)
            for label, kind in self.arms()
            for seed in range(self.seeds)
        ]

    def chosen(self, records: Sequence[dict[str, Any]]) -> dict[tuple[str, Kind], Setting]:
        """Choose each arm's setting by the held-out error, re-estimated; of equal errors, the smaller setting."""
        if len(self.settings()) == 1:
            return dict.fromkeys(self.arms(), self.settings()[0])
        errors: dict[tuple[str, Kind], dict[Setting, float]] = {arm: {} for arm in self.arms()}
        for record in records:
            run = record["run"]
            arm = errors.get((run["method"], run["budget"]))
            if arm is not None:
                arm[Setting(run["lr"], run["weight_decay"])] = _held_out(record)
        return {arm: min(found, key=lambda s: (found[s], s)) for arm, found in errors.items()}

    def train(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Train the runs that have no record yet, and return the records of all, in order.

        Raises:
            RuntimeError: if a training failed; names the log. The others are finished first.
        """
        return trainings.train(runs, self.out / "runs", self.workers, execute)


def _held_out(record: dict[str, Any]) -> float:
    error = record["final"]["val_error"]
    return error if error == error else float("inf")
