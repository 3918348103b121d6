"""Choose every method's learning rate by the same search, then repeat over seeds; finished trainings are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.compare.budget import Kind
from recipes.compare.methods import Method
from recipes.compare.run import Run, Task, execute


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        task: what the methods share.
        methods: their labels.
        lrs: the learning rates that each method tries, once, with seed 0; the one of least held-out error at the end
            is its own.
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

    def __post_init__(self) -> None:
        if not self.lrs:
            raise ValueError("lrs must hold a learning rate, got none")
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {self.seeds}")
        for name in ("methods", "lrs", "budgets"):
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

    def search_runs(self) -> list[Run]:
        """List the trainings that choose the learning rates."""
        if len(self.lrs) == 1:
            return []
        return [Run(self.task, label, lr, 0, kind) for label, kind in self.arms() for lr in self.lrs]

    def final_runs(self, records: Sequence[dict[str, Any]]) -> list[Run]:
        """List the trainings that are compared, given the records of the search."""
        rates = self.chosen(records)
        return [
            Run(self.task, label, rates[label, kind], seed, kind)
            for label, kind in self.arms()
            for seed in range(self.seeds)
        ]

    def chosen(self, records: Sequence[dict[str, Any]]) -> dict[tuple[str, Kind], float]:
        """Choose each arm's learning rate by the held-out error, re-estimated; of equal errors, the smaller rate."""
        if len(self.lrs) == 1:
            return dict.fromkeys(self.arms(), self.lrs[0])
        return {
            (label, kind): min(
                (record for record in records if (record["run"]["method"], record["run"]["budget"]) == (label, kind)),
                key=lambda record: (_held_out(record), record["run"]["lr"]),
            )["run"]["lr"]
            for label, kind in self.arms()
        }

    def train(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Train the runs that have no record yet, and return the records of all, in order.

        Raises:
            RuntimeError: if a training failed; names the log. The others are finished first.
        """
        folder = self.out / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {run.name: run for run in runs}
        pending = [run for name, run in wanted.items() if not (folder / f"{name}.json").exists()]
        print(f"{len(wanted) - len(pending)} of {len(wanted)} trainings are there", flush=True)
        if self.workers == 0:
            for run in pending:
                execute(run, folder)
        else:
            failed = _in_processes(pending, folder, self.workers)
            if failed:
                said = "".join(f"\n{log}: {_last_line(log)}" for log in failed)
                raise RuntimeError(f"every training must finish, got {len(failed)} that did not:{said}")
        return [json.loads((folder / f"{run.name}.json").read_text()) for run in runs]


# Keep freed memory: glibc gives each large activation back to the system and gets zeroed pages anew, a sixth of a step
# of All-CNN on a CPU. Other allocators ignore it.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def _held_out(record: dict[str, Any]) -> float:
    error = record["final"]["val_error"]
    return error if error == error else float("inf")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "said nothing"


def _in_processes(runs: Sequence[Run], folder: Path, workers: int) -> list[Path]:
    """Train each run in a process, and so with memory, of its own; return the logs of those that failed."""
    waiting, going, failed, done = list(runs), {}, [], 0
    free = _shares(workers)
    try:
        while waiting or going:
            while waiting and free:
                run, cores = waiting.pop(0), free.pop(0)
                log = folder / f"{run.name}.log"
                going[_start(run, folder, log, cores)] = (run, log, time.monotonic(), cores)
            time.sleep(0.2)
            for process in [process for process in going if process.poll() is not None]:
                run, log, since, cores = going.pop(process)
                free.append(cores)
                done += 1
                if process.returncode:
                    failed.append(log)
                outcome = f"failed, see {log}" if process.returncode else f"{time.monotonic() - since:.0f} s"
                print(
                    f"[{done}/{len(runs)}] {run.method} {run.budget} lr {run.lr:g} seed {run.seed}: {outcome}",
                    flush=True,
                )
    finally:
        for process in going:
            process.terminate()
    return failed


def _shares(workers: int) -> list[list[int]]:
    """Deal the cores to the workers evenly; a remainder stays idle. There is at most one worker a core."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = max(1, len(cores) // workers)
    return [cores[first : first + each] for first in range(0, len(cores) - each + 1, each)][:workers]


def _start(run: Run, folder: Path, log: Path, cores: list[int]) -> subprocess.Popen:
    threads = max(1, len(cores) // Method.parse(run.method).replicas)
    place = [str(os.getpid()), json.dumps(cores)]
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "recipes.compare.run", json.dumps(asdict(run)), str(folder), log.stem, *place],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=KEEP_MEMORY | os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
