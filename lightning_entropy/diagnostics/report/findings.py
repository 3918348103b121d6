"""All diagnostics of one checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_entropy.diagnostics.examples import Batch
from lightning_entropy.diagnostics.figures import Result
from lightning_entropy.diagnostics.gradient_noise import gradient_noise
from lightning_entropy.diagnostics.hessian import hessian_spectrum
from lightning_entropy.diagnostics.local_entropy import local_entropy
from lightning_entropy.diagnostics.loss import Loss, cross_entropy
from lightning_entropy.diagnostics.report.data import Data
from lightning_entropy.diagnostics.report.losses import loss_and_error
from lightning_entropy.diagnostics.report.pace import FEW, MANY, Pace, measured
from lightning_entropy.diagnostics.report.rows import ROWS, Row
from lightning_entropy.diagnostics.surface import LossSurface
from lightning_entropy.diagnostics.trajectory import TrajectoryResult, analyse_trajectory
from lightning_entropy.diagnostics.untouched import untouched

# Puts a limit to a loss, whose default is None.
Limit = Callable[[Loss | None], Loss | None]

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
# What the report itself says, or says once for all estimators.
COMMON = {"module", "data", "loss", "examples", "batch_dim", "mode", "seed", "state", "transfer", "progress"}
DEFAULTS: dict[str, dict[str, Any]] = {
    name: {key: p.default for key, p in signature(estimator).parameters.items() if key not in COMMON}
    for name, estimator in ESTIMATORS.items()
}
# What a report takes of the Hessian's and local entropy's settings unless told otherwise: a profile, at the price of
# shorter chains.
SPECTRUM: dict[str, Any] = {"products": 300}
VALLEY: dict[str, Any] = {
    "sigmas": [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1],
    "samples": 20,
    "warmup": 10,
    "draws": 8,
}


# Of examples, for the errors that their choice makes.
GROUPS = 16
# Examples of the first look; each of the next ones has twice as many.
FIRST = 32
# Of what else grows with the examples, to what it is set to at the last look, the fewest. Student's interval of two
# draws is twenty-five times as wide as that of many.
FEWEST: dict[str, dict[str, int]] = {
    "hessian": {"top": 2, "probes": 4, "steps": 16, "products": 40, "groups": 8},
    "local_entropy": {"chains": 3, "samples": 4, "warmup": 4, "leaps": 2, "draws": 4, "groups": 8},
    "gradient_noise": {"groups": 8},
}

_FACTS = {"epoch": "epoch", "step": "global_step", "lightning": "pytorch-lightning_version"}


@dataclass(frozen=True)
class Left:
    """That a section's last, finest look was left out.

    Args:
        examples: How many it has seen.
        budget: With how many seconds all sections would have had theirs. None: not told, since the looking was ended.
    """

    examples: int
    budget: int | None = None


@dataclass
class Findings:
    """What was measured at one checkpoint.

    Args:
        title: The checkpoint's name.
        results: By section.
        left: Sections whose last look was left out for want of time.
        failed: Sections that could not be measured, with the reason.
    """

    title: str
    results: dict[str, Result] = field(default_factory=dict)
    left: dict[str, Left] = field(default_factory=dict)
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
        self.loss = loss
        self._given: dict[str, Any] = {
            "loss": loss,
            "batch_dim": data.batch_dim,
            "seed": seed,
            "transfer": data.transfer(module),
        }
        self._mode = mode
        ours: dict[str, Any] = {"hessian": {"mode": mode, **SPECTRUM}, "local_entropy": {"mode": mode, **VALLEY}}
        self._own = {
            name: known | {"groups": GROUPS} | ours.get(name, {}) | (settings or {}).get(name, {})
            for name, known in DEFAULTS.items()
        }
        self._checkpoint = checkpoint or {}
        self.findings = Findings(title)

    @property
    def splits(self) -> int:
        """The number of splits whose loss is measured."""
        return len(self._data.splits)

    def settings(self, section: str, share: float = 1.0) -> dict[str, Any]:
        """Return an estimator's settings, with a share of what grows with the examples."""
        own = dict(self._own.get(section, {}))
        if share < 1:
            for name, fewest in FEWEST.get(section, {}).items():
                own[name] = min(own[name], max(fewest, round(share * own[name])))
        if share < 0.5 and own.get("sigmas"):
            own["sigmas"] = list(own["sigmas"])[::3]
        return own

    def measure(self, section: str, examples: int, share: float = 1.0, limited: Limit = lambda loss: loss) -> Result:
        """Run the estimator of a section.

        Args:
            section: To be measured.
            examples: How many.
            share: Of the draws that it is to have at the last look, in (0, 1].
            limited: Puts a limit to a loss.
        """
        given: dict[str, Any] = {**self._given, "loss": limited(self.loss)}
        if section == "loss":
            splits = {name: self._data.batches(name, examples) for name in self._data.splits}
            return loss_and_error(self._module, splits, **given)
        batches = self._data.batches(self._split, examples)
        own = self.settings(section, share)
        return ESTIMATORS[section](self._module, batches, examples=examples, progress=True, **given, **own)

    def try_loss(self, call: Callable[[Loss, pl.LightningModule, Batch], Any]) -> None:
        """Call with the loss, the module and a batch of a few examples, where the module is ready to be measured."""
        batch = self._data.batches(self._split, FEW)[0]
        with untouched(self._module, self._mode, self._seed):
            call(self.loss or cross_entropy, self._module, self._given["transfer"](batch))

    def pace(self) -> Pace:
        """Time one pass of each kind; what fails takes no time, and its section will say why."""
        few, many = (self._data.batches(self._split, examples)[0] for examples in (FEW, MANY))

        def surface(batches: Sequence[Batch]) -> LossSurface:
            return LossSurface(self._module, batches, mode=self._mode, **self._given)

        try:
            with untouched(self._module, self._mode, self._seed):
                return measured(surface, [few, many], self._data.batch_size(self._split))
        except (ValueError, RuntimeError):
            return Pace.nothing()

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


def _recording(checkpoint: dict[str, Any], seed: int) -> TrajectoryResult | None:
    for key, state in checkpoint.get("callbacks", {}).items():
        if key.startswith("Trajectory{") and len(state["path"]) >= 64:
            norms = state["norms"]
            norms = () if torch.isnan(norms).any() else norms.tolist()
            return analyse_trajectory(state["path"], interval=state["interval"], gradient_norms=norms, seed=seed)
    return None
