"""All diagnostics of one checkpoint."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_entropy.diagnostics.examples import Batch
from lightning_entropy.diagnostics.figures import Result
from lightning_entropy.diagnostics.gradient_noise import gradient_noise
from lightning_entropy.diagnostics.hessian import hessian_spectrum
from lightning_entropy.diagnostics.local_entropy import local_entropy
from lightning_entropy.diagnostics.loss import Loss
from lightning_entropy.diagnostics.report.rows import ROWS, Row
from lightning_entropy.diagnostics.trajectory import TrajectoryResult, analyse_trajectory

SECTIONS = {
    "hessian": "How flat is the minimum: the Hessian",
    "local_entropy": "How wide is the valley: local entropy and flatness profile",
    "gradient_noise": "How loud and how round is the noise: the diffusion matrix",
    "trajectory": "Does SGD walk in circles: the recorded path",
}
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


@dataclass
class Findings:
    """What was measured at one checkpoint.

    Args:
        title: The checkpoint's name.
        results: By section.
    """

    title: str
    results: dict[str, Result] = field(default_factory=dict)

    def rows(self) -> dict[str, list[Row]]:
        """Return each section's numbers, in the order of the page."""
        return {name: ROWS[name](result) for name, result in self.results.items()}


def measure(
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule,
    *,
    title: str,
    split: str = "train",
    loss: Loss | None = None,
    examples: int = 512,
    batch_dim: int | None = None,
    mode: str = "eval",
    seed: int = 0,
    skip: Iterable[str] = (),
    checkpoint: dict[str, Any] | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
) -> Findings:
    """Run every diagnostic on a module.

    Args:
        module: With the weights to measure, on its device.
        datamodule: Set up.
        title: Of the findings.
        split: "train" or "val".
        loss: ``(module, batch) -> scalar``. None: cross entropy.
        examples: How many examples.
        batch_dim: Dimension of the tensors that counts examples. None: that of the one size that they share.
        mode: "eval" or "train" for the Hessian and local entropy.
        seed: Of everything drawn, so that two checkpoints are measured alike.
        skip: Sections to leave out.
        checkpoint: Where a :class:`~lightning_entropy.diagnostics.Trajectory` may have left its recording.
        settings: More arguments for the estimators, by section.

    Returns:
        The findings.

    Raises:
        ValueError: If ``skip`` or ``split`` names nothing.
    """
    skip, settings = set(skip), settings or {}
    if unknown := skip - set(SECTIONS):
        raise ValueError(f"skip must name sections among {sorted(SECTIONS)}, got {sorted(unknown)}")
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", got {split!r}')
    data: Any = datamodule.train_dataloader() if split == "train" else datamodule.val_dataloader()
    data = data[0] if isinstance(data, list | tuple) and not isinstance(data[0], tuple) else data
    given: dict[str, Any] = {
        "loss": loss,
        "examples": examples,
        "batch_dim": batch_dim,
        "seed": seed,
        "transfer": transfer_of(module, datamodule),
        "progress": True,
    }
    own: dict[str, dict[str, Any]] = {"hessian": {"mode": mode}, "local_entropy": {"mode": mode, **VALLEY}}
    findings = Findings(title)
    for name, estimator in ESTIMATORS.items():
        if name not in skip:
            more = own.get(name, {}) | settings.get(name, {})
            findings.results[name] = estimator(module, data, **given, **more)
    if "trajectory" not in skip and (recorded := _recording(checkpoint or {}, seed)) is not None:
        findings.results["trajectory"] = recorded
    return findings


def transfer_of(module: pl.LightningModule, datamodule: pl.LightningDataModule) -> Callable[[Batch], Batch]:
    """Compose the batch-transfer hooks as a trainer would: the datamodule's where it overrides them."""

    def owner(hook: str) -> Any:
        return datamodule if is_overridden(hook, datamodule) else module

    def transfer(batch: Batch) -> Batch:
        batch = owner("on_before_batch_transfer").on_before_batch_transfer(batch, 0)
        batch = owner("transfer_batch_to_device").transfer_batch_to_device(batch, module.device, 0)
        return owner("on_after_batch_transfer").on_after_batch_transfer(batch, 0)

    return transfer


def _recording(checkpoint: dict[str, Any], seed: int) -> TrajectoryResult | None:
    for key, state in checkpoint.get("callbacks", {}).items():
        if key.startswith("Trajectory{") and len(state["path"]) >= 64:
            norms = state["norms"]
            norms = () if torch.isnan(norms).any() else norms.tolist()
            return analyse_trajectory(state["path"], interval=state["interval"], gradient_norms=norms, seed=seed)
    return None
