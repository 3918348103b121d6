"""What a section of a report takes, from the time of one loss, one gradient and one Hessian-vector product."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_entropy.diagnostics.examples import Batch
from lightning_entropy.diagnostics.surface import LossSurface

# Examples of the batches that are timed, if so many are in one.
FEW, MANY = 4, 32
# Rungs of local entropy's ladder, until one has been climbed.
_RUNGS = 13
# Side of the matrix whose eigenvalues are timed, or thereabouts.
_SIDE = 128


@dataclass(frozen=True)
class Line:
    """Seconds of a pass over some examples: so many for each batch, and so many for each example.

    Example:
        >>> Line(0.5, 0.25).over(8, batches=2)
        3.0
        >>> Line.through(2, 1.0, 6, 2.0)
        Line(batch=0.5, example=0.25)
    """

    batch: float = 0.0
    example: float = 0.0

    @classmethod
    def through(cls, few: int, short: float, many: int, long: float) -> "Line":
        """Return the line through the times of two batches; a single time is in proportion to its examples."""
        if many <= few or long <= short:
            return cls(0.0, long / max(few, many))
        slope = (long - short) / (many - few)
        return cls(max(0.0, short - slope * few), min(slope, long / many))

    def over(self, examples: float, batches: float = 1.0) -> float:
        """Return the seconds for so many examples in so many batches."""
        return self.batch * batches + self.example * examples


@dataclass(frozen=True)
class Pace:
    """How long one pass takes.

    Args:
        weights: P.
        batch_size: Of the loader.
        value: Of the loss.
        gradient: Of the loss and its gradient.
        graph: Of a gradient whose graph is kept.
        product: Of one Hessian-vector product through that graph.
        eigen: Seconds for the eigenvalues of a symmetric matrix, over the cube of its side.
    """

    weights: int
    batch_size: int
    value: Line
    gradient: Line
    graph: Line
    product: Line
    eigen: float = 0.0

    @classmethod
    def nothing(cls) -> "Pace":
        """Return that of passes which take no time."""
        return cls(1, 1, Line(), Line(), Line(), Line())

    def seconds(self, section: str, settings: Mapping[str, Any], examples: int, *, splits: int = 1) -> float:
        """Return what a section takes: a count of passes, which leaves out what is small beside them.

        Args:
            section: Of the report.
            settings: Of its estimator; ``climbed`` is the number of rungs that local entropy had in the look before.
            examples: To be measured on.
            splits: With a loss to be measured.
        """
        batches = -(-examples // self.batch_size)
        groups = min(settings.get("groups") or 0, examples)
        if section == "loss":
            return splits * self.value.over(examples, batches)
        if section == "hessian":
            return self._hessian(settings, examples, batches, groups)
        if section == "local_entropy":
            return self._local_entropy(settings, examples, batches, groups)
        if section == "gradient_noise":
            side = min(examples, self.weights)
            return 3 * self.gradient.over(examples, batches) + (groups + 1) * self.eigen * side**3
        return 0.0

    def _hessian(self, settings: Mapping[str, Any], examples: int, batches: int, groups: int) -> float:
        def passes(rounds: float, vectors: float, parts: float) -> float:
            return rounds * self.graph.over(examples, parts) + rounds * vectors * self.product.over(examples, parts)

        if self.weights <= settings["dense_limit"]:
            return passes(1, self.weights, batches) + (passes(1, self.weights, groups) if groups else 0.0)
        probes, steps = settings["probes"], min(settings["steps"], self.weights)
        pairs = settings["top"] + settings["bottom"]
        most = settings["products"] if pairs else 0
        if batches == 1:  # one graph serves all
            found = passes(1, most + probes * steps, 1)
        else:
            found = passes(most, 1, batches) + passes(steps, probes, batches)
        if groups:  # groups drawn anew leave out a third of them
            found += passes(1, pairs + probes, groups) + passes(steps, 0.64 * probes, groups)
        return found

    def _local_entropy(self, settings: Mapping[str, Any], examples: int, batches: int, groups: int) -> float:
        rungs = settings.get("climbed") or _RUNGS
        chains, draws = settings["chains"], settings["draws"]
        proposals = rungs * (settings["samples"] + settings["warmup"]) * chains
        found = proposals * settings["leaps"] * self.gradient.over(examples, batches)
        found += (rungs / 2 + 2) * 2 * draws * chains * self.value.over(examples, batches)
        visits = (rungs + 1) / 2 * settings["samples"] * chains if groups else 0
        profile = 2 * draws * len(settings["sigmas"] or ())
        return found + (visits + profile) * self.value.over(examples, groups or batches)


def measured(surface: Callable[[Sequence[Batch]], LossSurface], batches: Sequence[Batch], batch_size: int) -> Pace:
    """Time one pass of each kind, on a few examples and, where that is quick, on more.

    What cannot be had, as a second derivative may be, takes no time: its section says why it fails.

    Args:
        surface: Makes the loss over some batches.
        batches: Two single batches, of fewer and of more examples.
        batch_size: Of the loader.
    """
    timed: list[dict[str, float]] = []
    sizes: list[int] = []
    weights = 0
    for i, batch in enumerate(batches):
        if timed and 10 * sum(timed[0].values()) > 1.0:  # a large net: what is known will do
            break
        of_batch = surface([batch])
        weights = len(of_batch)
        sizes.append(of_batch.examples)
        timed.append(_times(of_batch, warm=i == 0))
    few, many = timed[0], timed[-1]

    def line(name: str) -> Line:
        return Line.through(sizes[0], few[name], sizes[-1], many[name])

    matrix = torch.eye(_SIDE, dtype=torch.float64) + 0.01
    torch.linalg.eigvalsh(matrix)
    eigen = _timed(lambda: torch.linalg.eigvalsh(matrix)) / _SIDE**3
    return Pace(weights, batch_size, line("value"), line("gradient"), line("graph"), line("product"), eigen)


def _times(surface: LossSurface, warm: bool) -> dict[str, float]:
    w = surface.weights
    found = {"value": 0.0, "gradient": 0.0, "graph": 0.0, "product": 0.0}
    try:
        vector = torch.ones(1, len(w), dtype=w.dtype, device=w.device)
        if warm and _timed(lambda: surface.gradient(w)) < 0.5:  # what is set up at the first pass is no pass
            surface.hessian_products(w, vector)
            surface.value_and_gradient(w)
        found["value"] = _timed(lambda: surface.evaluate(w))
        found["gradient"] = _timed(lambda: surface.gradient(w))
        # A copy of the weights has no graph yet.
        both = _timed(lambda: surface.hessian_products(w.clone(), vector))
        found["product"] = _timed(lambda: surface.hessian_products(w, vector))
        found["graph"] = max(both - found["product"], found["gradient"])
    except (ValueError, RuntimeError):
        pass
    return found


def _timed(run: Callable[[], torch.Tensor]) -> float:
    """Return the shortest of a few runs: what else the machine does makes the others longer."""
    shortest, total = math.inf, 0.0
    for _ in range(3):
        start = time.perf_counter()
        run().sum().item()  # waits for the device
        took = time.perf_counter() - start
        shortest, total = min(shortest, took), total + took
        if total > 0.1:
            break
    return shortest
