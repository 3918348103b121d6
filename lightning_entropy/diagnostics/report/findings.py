"""All diagnostics of one checkpoint."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_entropy.diagnostics.figures import Result
from lightning_entropy.diagnostics.gradient_noise import gradient_noise
from lightning_entropy.diagnostics.hessian import hessian_spectrum
from lightning_entropy.diagnostics.local_entropy import local_entropy
from lightning_entropy.diagnostics.loss import Loss
from lightning_entropy.diagnostics.report.data import Data
from lightning_entropy.diagnostics.report.losses import loss_and_error
from lightning_entropy.diagnostics.report.names import said
from lightning_entropy.diagnostics.report.rows import ROWS, Row
from lightning_entropy.diagnostics.trajectory import TrajectoryResult, analyse_trajectory

SECTIONS = {
    "loss": "Loss and error",
    "hessian": "How flat is the minimum: the Hessian",
    "local_entropy": "How wide is the valley: local entropy and flatness profile",
    "gradient_noise": "How loud and how round is the noise: the diffusion matrix",
    "trajectory": "Does SGD walk in circles: the recorded path",
}
# Those that take settings from the command line.
ESTIMATORS: dict[str, Callable[..., Result]] = {
    "hessian": hessian_spectrum,
    "local_entropy": local_entropy,
    "gradient_noise": gradient_noise,
}
# What a report takes of local_entropy's settings unless told otherwise: a profile, at the price of shorter chains.
VALLEY: dict[str, Any] = {
    "sigmas": [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1],
    "samples": 20,
    "warmup": 10,
    "draws": 8,
}


# Of examples, for the errors that their choice makes.
GROUPS = 16
# Examples of the first look; each of the next ones has four times as many.
FIRST, GROWTH = 64, 4
# What else grows with the examples, to what it is set to at the last look.
GROWING = {"local_entropy": ("samples", "warmup", "draws")}
# The fewest of them: Student's interval of two draws is twenty-five times as wide as that of many.
FEWEST = 4

_FACTS = {"epoch": "epoch", "step": "global_step", "lightning": "pytorch-lightning_version"}


@dataclass
class Findings:
    """What was measured at one checkpoint.

    Args:
        title: The checkpoint's name.
        results: By section.
        left: Sections whose last, finest look was left out for want of time, with how many examples they have seen.
        failed: Sections that could not be measured, with the reason.
    """

    title: str
    results: dict[str, Result] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def in_order(self) -> list[Result]:
        """Return the results in the order of the page."""
        return [self.results[name] for name in SECTIONS if name in self.results]

    def rows(self) -> dict[str, list[Row]]:
        """Return each section's numbers, in the order of the page."""
        return {name: ROWS[name](self.results[name]) for name in SECTIONS if name in self.results}


class Subject:
    """A module to be measured.

    Args:
        module: With the weights to measure, on its device.
        data: What it is measured on.
        title: Of the findings.
        split: "train" or "val": what all sections but the loss's look at.
        loss: ``(module, batch) -> scalar``. None: cross entropy.
        mode: "eval" or "train" for the Hessian and local entropy.
        seed: Of everything drawn, so that two checkpoints are measured alike.
        checkpoint: Where a :class:`~lightning_entropy.diagnostics.Trajectory` may have left its recording.
        settings: More arguments for the estimators, by section.

    Raises:
        ValueError: If ``split`` names nothing.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        data: Data,
        *,
        title: str,
        split: str = "train",
        loss: Loss | None = None,
        mode: str = "eval",
        seed: int = 0,
        checkpoint: dict[str, Any] | None = None,
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        if split not in data.splits:
            raise ValueError(f"split must name a loader of the data, {list(data.splits)}, got {split!r}")
        self._module, self._data, self._split, self._seed = module, data, split, seed
        self._given: dict[str, Any] = {
            "loss": loss,
            "batch_dim": data.batch_dim,
            "seed": seed,
            "transfer": data.transfer(module),
        }
        modes: dict[str, dict[str, Any]] = {"hessian": {"mode": mode}, "local_entropy": {"mode": mode, **VALLEY}}
        own = {name: {"groups": GROUPS, **modes.get(name, {})} for name in ESTIMATORS}
        self._own = {name: own[name] | (settings or {}).get(name, {}) for name in ESTIMATORS}
        self._checkpoint = checkpoint or {}
        self.findings = Findings(title)

    def measure(self, section: str, examples: int, share: float = 1.0) -> Result:
        """Run the estimator of a section, with a share of the draws that it is to have at the last look."""
        if section == "loss":
            splits = {name: self._data.batches(name, examples) for name in self._data.splits}
            return loss_and_error(self._module, splits, **self._given)
        own = dict(self._own[section])
        own |= {
            name: min(own[name], max(FEWEST, round(share * own[name])))
            for name in GROWING.get(section, ())
            if share < 1
        }
        batches = self._data.batches(self._split, examples)
        return ESTIMATORS[section](self._module, batches, examples=examples, progress=True, **self._given, **own)

    def facts(self) -> list[str]:
        """Return what the checkpoint says of itself."""
        known = [f"{name} {self._checkpoint[key]}" for name, key in _FACTS.items() if key in self._checkpoint]
        weights = sum(p.numel() for p in self._module.parameters() if p.requires_grad)
        return [*known, f"{weights:,} trainable weights"]

    def data_facts(self) -> str:
        """Return which examples are looked at."""
        return f"{self._split} split; loss and error on {' and '.join(self._data.splits)}"

    def recording(self) -> TrajectoryResult | None:
        """Analyse the path that a callback has left in the checkpoint, if one has."""
        return _recording(self._checkpoint, self._seed)


def look(
    subjects: Sequence[Subject],
    *,
    examples: int = 512,
    budget: float | None = None,
    skip: Iterable[str] = (),
    grown: Callable[[], None] = lambda: None,
) -> None:
    """Measure one or two checkpoints: on few examples first, then on more and more while time is left.

    All are measured alike: a look that only some of them could have counts for none. What the next look takes is told
    from the last one of its section, in proportion to the examples, and to the draws where they grow too. The first
    look is taken whatever it takes. Ctrl+C ends the looking, and what was found stays.

    A section that an estimator refuses is one that says why.

    Args:
        subjects: To be measured, in turn; their ``findings`` are filled.
        examples: Of the last look, >= 1.
        budget: Seconds after which no look should end, > 0. None: only the last look is taken, whatever it takes.
        skip: Sections to leave out.
        grown: Called whenever findings have grown.

    Raises:
        ValueError: If ``skip`` names nothing, or a number is outside its range.
    """
    skip = set(skip)
    if unknown := skip - set(SECTIONS):
        raise ValueError(f"skip must name sections among {sorted(SECTIONS)}, got {sorted(unknown)}")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be > 0 seconds or None, got {budget}")
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    end = math.inf if budget is None else time.monotonic() + budget
    took: dict[str, tuple[int, float]] = {}
    measured = [name for name in ("loss", *ESTIMATORS) if name not in skip]
    try:
        _record(subjects, skip, grown)
        for size in [examples] if budget is None else sizes(examples):
            # The quick ones first; at the first look, in the order of the page.
            for section in sorted(measured, key=lambda name: took.get(name, (0, 0.0))[1]):
                before, seconds = took.get(section, (size, 0.0))
                power = 2 if section in GROWING else 1
                if section in took and time.monotonic() + seconds * (size / before) ** power > end:
                    for subject in subjects:
                        subject.findings.left[section] = before
                    continue
                start = time.monotonic()
                try:
                    results = [subject.measure(section, size, size / examples) for subject in subjects]
                except (ValueError, RuntimeError) as error:
                    _fail(subjects, section, said(error))
                    measured = [name for name in measured if name != section]
                    continue
                took[section] = size, time.monotonic() - start
                for subject, result in zip(subjects, results, strict=True):
                    subject.findings.results[section] = result
                grown()
    except KeyboardInterrupt:
        for section in measured:
            seen = took.get(section, (0, 0.0))[0]
            for subject in subjects if seen < examples else ():
                subject.findings.left[section] = seen
        if not any(subject.findings.results for subject in subjects):
            raise


def sizes(examples: int) -> list[int]:
    """Return how many examples the looks have.

    Example:
        >>> sizes(512), sizes(300), sizes(20)
        ([64, 256, 512], [64, 256, 300], [20])
    """
    found = [FIRST]
    while found[-1] < examples:
        found.append(found[-1] * GROWTH)
    return sorted({min(size, examples) for size in found})


def _record(subjects: Sequence[Subject], skip: set[str], grown: Callable[[], None]) -> None:
    if "trajectory" in skip:
        return
    for subject in subjects:
        if (recorded := subject.recording()) is not None:
            subject.findings.results["trajectory"] = recorded
            grown()


def _fail(subjects: Sequence[Subject], section: str, reason: str) -> None:
    """Note why a section has not been measured, or not more finely than it has been."""
    for subject in subjects:
        subject.findings.failed[section] = reason


def _recording(checkpoint: dict[str, Any], seed: int) -> TrajectoryResult | None:
    for key, state in checkpoint.get("callbacks", {}).items():
        if key.startswith("Trajectory{") and len(state["path"]) >= 64:
            norms = state["norms"]
            norms = () if torch.isnan(norms).any() else norms.tolist()
            return analyse_trajectory(state["path"], interval=state["interval"], gradient_norms=norms, seed=seed)
    return None
