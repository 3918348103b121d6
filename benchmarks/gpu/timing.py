"""Seconds of functions that take turns on a device."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of a call: median and quartiles of the rounds, and the ratio to the first function of each round."""

    seconds: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds of a call, of several in a row: what the device needs, or the host if that is longer."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def in_turns(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int, repeats: int
) -> dict[str, Times]:
    """Time functions that take turns, so that other load hits all alike.

    Args:
        calls: by name; ratios are to the first.
        device: on which they work.
        rounds: of all in turn.
        repeats: calls in a row per turn; as many warm up.
    """
    for call in calls.values():
        once(call, device, repeats)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(once(call, device, repeats))
    unit = next(iter(seconds.values()))
    found = {}
    for name, values in seconds.items():
        ratios = [v / u for v, u in zip(values, unit, strict=True)]
        found[name] = Times(
            statistics.median(values), *_quartiles(values), statistics.median(ratios), *_quartiles(ratios)
        )
    return found


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def copy_rate(device: torch.device, size: int) -> float:
    """Return the bytes per second that a copy of float32 reads and writes together.

    Args:
        device: whose memory.
        size: numbers.
    """
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    times = in_turns({"copy": lambda: target.copy_(source)}, device, 9, 5)
    return 8 * size / times["copy"].seconds


def matmul_rate(device: torch.device, size: int) -> float:
    """Return the floating-point operations per second of a product of bfloat16 matrices.

    Args:
        device: that multiplies.
        size: rows and columns.
    """
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = in_turns({"matmul": lambda: a @ b}, device, 9, 5)
    return 2 * size**3 / times["matmul"].seconds
