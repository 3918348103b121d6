"""How fast a method would be on a link: arithmetic from the time of a step and the bytes that it sends.

Not measured with the replicas running, as these share one machine's cores here; and not in network namespaces as
``benchmarks.communication``, which joins two hosts and needs root. Its measurements are what the arithmetic agrees
with. Latency is left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

import lightning_entropy as le
from recipes.compare.lm.methods import ANY, METHODS, Arm
from recipes.compare.lm.run import Task
from recipes.data.cache import write
from recipes.lm.gpt import GPT

LINKS = {"1 Gbit/s": 1e9, "100 Mbit/s": 1e8}


def link_seconds(compute: float, sent: float, bits_per_second: float, *, hidden: float) -> float:
    """Return the seconds of a training step, on average, of a replica on a link of its own.

    Args:
        compute: seconds of the step alone.
        sent: bytes that the replica sends a step, on average.
        bits_per_second: of the link, each way.
        hidden: behind how many steps' computation the exchange of a step hides, on average, in [0, 1].

    Example:
        >>> link_seconds(0.1, 1e6, 1e8, hidden=0), link_seconds(0.1, 1e6, 1e8, hidden=1)
        (0.18, 0.1)
    """
    transfer = 8 * sent / bits_per_second
    return compute + max(transfer - hidden * compute, 0.0)


def step_seconds(task: Task, arms: Sequence[Arm], path: Path, *, rounds: int = 5) -> dict[Arm, float]:
    """Return the seconds of a step of one replica of each arm, alone on one core; those in ``path`` are kept.

    Seconds are the processor's, the arms take turns, and the best of an arm's turns counts, so that other load on the
    machine matters least. Arms whose inner step is the plain optimizer's share one measurement: an outer step every H
    is left out.
    """
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    first: dict[str, Arm] = {}
    for arm in arms:
        first.setdefault(_key(arm), arm)
    steppers = {key: stepper(task, arm) for key, arm in first.items() if key not in known}
    turns = [{key: turn() for key, turn in steppers.items()} for _ in range(rounds + 1)][1:]
    known |= {key: min(turn[key] for turn in turns) for key in steppers}
    write(path, lambda file: file.write(json.dumps(known, indent=1).encode()))
    return {arm: known[_key(arm)] for arm in arms}


def stepper(task: Task, arm: Arm) -> Callable[[], float]:
    """Return a function that takes steps of a replica, ten or a loop of them, and returns the seconds of one.

    A step is a replica's batch forward and backward, and its optimizer with its loop, in one thread.
    """
    net = GPT(**task.net)
    optimizer = task.optimizer(METHODS[arm.method], 1e-4)(net.parameter_groups())
    if relaxation := _chain(arm):
        le.relax(optimizer, relaxation)
    tokens = torch.randint(net.vocab_size, (task.batch_size // arm.replicas, task.net["block_size"] + 1))
    steps = max(10, arm.inner_steps)

    def turn() -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        start = time.process_time()
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        seconds = (time.process_time() - start) / steps
        torch.set_num_threads(threads)
        return seconds

    return turn


def _chain(arm: Arm) -> le.Relaxation | None:
    """Return the arm's loop if it does anything between two outer steps."""
    make = METHODS[arm.method].relaxation
    if make is None:
        return None
    relaxation = make(arm.inner_steps, ANY)
    costs = relaxation.gamma != 0 or relaxation.noise != 0 or relaxation.width != 0 or relaxation.average != 1
    return relaxation if costs else None


def _key(arm: Arm) -> str:
    own = f", {arm.method}" if _chain(arm) else ""
    return f"{METHODS[arm.method].optimizer}, {arm.replicas} replicas{own}"
