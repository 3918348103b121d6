"""Trainings side by side, each in a process of its own, of which those that are finished are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Training(Protocol):
    """What is trained once: a value that names itself, its replicas, and the module that trains it."""

    @property
    def name(self) -> str:
        """A file name of this training alone."""

    @property
    def replicas(self) -> int:
        """How many copies of the net are trained; each is a process."""

    @property
    def module(self) -> str:
        """The module whose command line trains it."""

    def to_json(self) -> str:
        """Return what the module's command line reads."""


Kept = TypeVar("Kept", bound=Training)


def train(
    runs: Sequence[Kept], folder: Path, workers: int, execute: Callable[[Kept, Path], Path]
) -> list[dict[str, Any]]:
    """Train the runs that have no record yet, and return the records of all, in order.

    Args:
        runs: what to train.
        folder: of the records; is made.
        workers: trainings at a time, each a process; 0 trains in this process.
        execute: trains one in this process and writes its record.

    Raises:
        RuntimeError: if a training failed; names the log. The others are finished first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {run.name: run for run in runs}
    pending = [run for name, run in wanted.items() if not (folder / f"{name}.json").exists()]
    if wanted:
        print(f"{len(wanted)} trainings, of which {len(wanted) - len(pending)} are kept from before", flush=True)
    if workers == 0:
        for run in pending:
            execute(run, folder)
    else:
        failed = _in_processes(pending, folder, workers)
        if failed:
            said = "".join(f"\n{log}: {_last_line(log)}" for log in failed)
            raise RuntimeError(f"every training must finish, got {len(failed)} that did not:{said}")
    return [json.loads((folder / f"{run.name}.json").read_text()) for run in runs]


# Keep freed memory: glibc gives each large activation back to the system and gets zeroed pages anew, a sixth of a step
# of All-CNN on a CPU. Other allocators ignore it.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "said nothing"


def _in_processes(runs: Sequence[Kept], folder: Path, workers: int) -> list[Path]:
    """Train each run in a process, and so with memory, of its own; return the logs of those that failed."""
    waiting, going, failed, done, began = list(runs), {}, [], 0, time.monotonic()
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
                left = (time.monotonic() - began) / done * (len(runs) - done)
                more = f", about {_duration(left)} to go" if done < len(runs) else ""
                print(f"[{done}/{len(runs)}] {run}: {outcome}{more}", flush=True)
    finally:
        for process in going:
            process.terminate()
    return failed


def _duration(seconds: float) -> str:
    """Return a time that one reads at a glance.

    Example:
        >>> _duration(50), _duration(400), _duration(9000)
        ('50 s', '7 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _shares(workers: int) -> list[list[int]]:
    """Deal the cores to the workers evenly; a remainder stays idle. There is at most one worker a core."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = max(1, len(cores) // workers)
    return [cores[first : first + each] for first in range(0, len(cores) - each + 1, each)][:workers]


def _start(run: Training, folder: Path, log: Path, cores: list[int]) -> subprocess.Popen:
    threads = max(1, len(cores) // run.replicas)
    place = [str(os.getpid()), json.dumps(cores)]
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", run.module, run.to_json(), str(folder), log.stem, *place],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=KEEP_MEMORY | os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
