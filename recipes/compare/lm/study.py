"""Which trainings there are: a small search for every method, and then each arm at its method's best settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.compare import trainings
from recipes.compare.lm.methods import FALL, METHODS, Arm, Settings
from recipes.compare.lm.run import Run, Task, execute
from recipes.compare.lm.speed import LINKS, link_seconds

Record = dict[str, Any]
Chosen = Mapping[str, Settings]

THROTTLED = "100 Mbit/s"  # of the table at equal time
SAME = 0.98  # of the steps: as many, for a table at equal time


@dataclass(frozen=True)
class Study:
    """A comparison of methods by loss and bytes.

    Every method chooses its settings at the centre, the middle number of replicas and of inner steps in the first
    format. From there one of the three is changed at a time.

    Attributes:
        task: what the methods share.
        methods: of ``METHODS``.
        vary: those that are also trained away from the centre.
        replicas: numbers above 1 to try.
        inner_steps: H to try.
        formats: to try.
        lrs: learning rates that every method tries, with seed 0.
        seeds: trainings of each arm: seeds 0, 1, ...
        out: folder for results.
        outer_momenta: of methods with an outer Nesterov step, to try.
        outer_finals: what its learning rate falls to, to try with each momentum.
        outer_fall: share of the training over which it does.
        workers: trainings at a time, each a process; 0 trains in this process.

    Raises:
        ValueError: a list is empty or has a value twice, or ``batch_size`` is not shared evenly.
    """

    task: Task
    methods: Sequence[str]
    vary: Sequence[str]
    replicas: Sequence[int]
    inner_steps: Sequence[int]
    formats: Sequence[str]
    lrs: Sequence[float]
    seeds: int
    out: Path
    outer_momenta: Sequence[float] = (0.5, 0.8, 0.9)
    outer_finals: Sequence[float] = (1.0,)
    outer_fall: float = FALL
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("methods", "replicas", "inner_steps", "formats", "lrs", "outer_momenta", "outer_finals"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones, at least one, got {values}")
        for replicas in self.replicas:
            if replicas < 2 or self.task.batch_size % replicas:
                raise ValueError(
                    f"replicas must be above 1 and divide batch_size = {self.task.batch_size}, got {replicas}"
                )

    @property
    def center(self) -> tuple[int, int, str]:
        """Replicas, inner steps and format that every method has in the search."""
        middle = [sorted(values)[len(values) // 2] for values in (self.replicas, self.inner_steps)]
        return middle[0], middle[1], self.formats[0]

    def central(self, name: str) -> Arm:
        """Return a method's arm at the centre."""
        method = METHODS[name]
        replicas, inner_steps, format = self.center
        loops = (method.inner_steps or inner_steps) if method.relaxation else 0
        return Arm(name, replicas if method.replicated else 1, loops, format if method.replicated else "float32")

    def arms(self) -> list[Arm]:
        """List what is trained: every method at the centre, then what differs from it in one thing."""
        found = [self.central(name) for name in self.methods]
        for center in list(found):
            if center.replicas == 1 or center.method not in self.vary:
                continue
            found += [replace(center, replicas=replicas) for replicas in sorted(self.replicas)]
            if center.inner_steps:
                found += [replace(center, inner_steps=steps) for steps in sorted(self.inner_steps)]
                found += [replace(center, format=format) for format in self.formats]
        return list(dict.fromkeys(found))

    def search_runs(self) -> list[Run]:
        """List the trainings that choose settings."""
        return [
            Run(self.task, self.central(name), settings, 0, self.task.steps)
            for name in self.methods
            for settings in self.tried(name)
        ]

    def tried(self, name: str) -> list[Settings]:
        """List a method's settings to try."""
        grid = METHODS[name].tried(self.lrs, self.outer_momenta, self.outer_finals, self.outer_fall)
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def chosen(self, records: Sequence[Record]) -> Chosen:
        """Choose each method's settings by the validation loss, from the records of the search, in order."""
        best: dict[str, tuple[float, Settings]] = {}
        for record in records:
            loss = record["val_loss"]
            found = (loss if loss == loss else math.inf, record["run"]["settings"])
            name = record["run"]["arm"]["method"]
            best[name] = min(best.get(name, found), found, key=lambda pair: pair[0])
        return {name: settings for name, (_, settings) in best.items()}

    def final_runs(self, chosen: Chosen) -> list[Run]:
        """List the trainings at equal tokens."""
        return [
            Run(self.task, arm, chosen[arm.method], seed, self.task.steps)
            for arm in self.arms()
            for seed in range(self.seeds)
        ]

    def timed_steps(self, records: Sequence[Record], seconds: Mapping[Arm, float]) -> dict[Arm, int]:
        """Count the steps that each arm of the central number of replicas makes in equal time on the throttled link.

        The time is what DDP's steps take without a limit; an arm that makes nearly as many makes all.

        Args:
            records: at equal tokens.
            seconds: of a step.
        """
        replicas = self.center[0]
        if "ddp" not in self.methods:
            return {}
        total = self.task.steps * seconds[self.central("ddp")]
        steps = {}
        for arm in self.arms():
            if arm.replicas != replicas:
                continue
            own = [record for record in records if arm == Arm(**record["run"]["arm"])]
            if any(record["bytes_per_token"] != record["bytes_per_token"] for record in own):
                continue  # it diverged
            sent = own[0]["bytes_per_token"] * self.task.tokens_per_step / replicas
            hidden = METHODS[arm.method].hidden(arm.inner_steps)
            share = total / link_seconds(seconds[arm], sent, LINKS[THROTTLED], hidden=hidden) / self.task.steps
            steps[arm] = self.task.steps if share >= SAME else max(1, int(share * self.task.steps))
        return steps

    def timed_runs(self, chosen: Chosen, steps: Mapping[Arm, int]) -> list[Run]:
        """List the trainings at equal time; the schedule of each ends with its own last step."""
        return [
            Run(self.task, arm, chosen[arm.method], seed, count)
            for arm, count in steps.items()
            for seed in range(self.seeds)
        ]

    def train(self, runs: Sequence[Run]) -> list[Record]:
        """Train the runs that have no record yet, and return the records of all, in order.

        Raises:
            RuntimeError: if a training failed; names the log. The others are finished first.
        """
        return trainings.train(runs, self.out / "runs", self.workers, execute)
