"""The loss of a checkpoint and, of a classifier, its error rate: on each part of the data, with error bars."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lightning_entropy.diagnostics.estimate import GroupValues
from lightning_entropy.diagnostics.examples import Batch, BatchDim
from lightning_entropy.diagnostics.figures import axes_for
from lightning_entropy.diagnostics.loss import Loss, cross_entropy
from lightning_entropy.diagnostics.surface import LossSurface
from lightning_entropy.diagnostics.untouched import untouched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPLITS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class SplitLoss:
    """The loss on some examples of one split.

    Args:
        examples: How many.
        losses: Of each example; of each batch where the loss of one cannot be told.
        wrong: 1 for each example that is classified wrongly, else 0. None: no class scores.
        unit: "example" or "batch": what ``losses`` are of.
    """

    examples: int
    losses: GroupValues
    wrong: GroupValues | None
    unit: str


@dataclass(frozen=True)
class LossResult:
    """Loss and error rate in eval mode.

    Args:
        splits: By name, "train" and "val".
    """

    splits: dict[str, SplitLoss]

    def numbers(self) -> dict[str, tuple[str, GroupValues]]:
        """Return what is measured on which split, by the name of a line."""
        found = {}
        for split, loss in self.splits.items():
            found[f"{SPLITS[split]} loss"] = split, loss.losses
            if loss.wrong is not None:
                many = GroupValues(100 * loss.wrong.values, loss.wrong.shares)
                found[f"{SPLITS[split]} error, %"] = split, many
        return found

    def scalars(self) -> dict[str, float]:
        """Return the numbers worth a line in a log, by name."""
        return {
            name.replace(", %", "_percent").replace(" ", "_"): values.estimate.value
            for name, (_, values) in self.numbers().items()
        }

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw what share of the examples has more than each loss, and the mean with its 99 % interval."""
        ax = axes_for(ax)
        for (split, found), color in zip(self.splits.items(), ("tab:blue", "tab:red"), strict=False):
            order = np.argsort(found.losses.values)
            above = 1 - np.cumsum(found.losses.shares[order])
            name = SPLITS[split]
            values = found.losses.values[order]
            ax.step(np.r_[values[:1], values], np.r_[1.0, above], where="post", color=color, lw=1.2, label=name)
            mean = found.losses.estimate
            if np.isfinite(mean.error):
                label = f"{name}: mean, 99 % interval"
                ax.axvspan(mean.value - mean.error, mean.value + mean.error, color=color, alpha=0.2, lw=0, label=label)
            ax.axvline(mean.value, color=color, lw=1, ls="--")
        positive = [v[v > 0] for v in (found.losses.values for found in self.splits.values())]
        if all(len(v) for v in positive):
            # Losses that are numerically zero say nothing but that they are.
            low, high = min(np.quantile(v, 0.02) for v in positive), max(v.max() for v in positive)
            ax.set_xscale("log")
            ax.set_xlim(max(low, 1e-6 * high) / 1.5, 1.5 * high)
        ax.set_ylim(0, 1.02)
        units = {found.unit for found in self.splits.values()}
        noun = "batches" if units == {"batch"} else "examples"
        ax.set_xlabel(f"loss of one {noun.removesuffix('es') if noun == 'batches' else 'example'}")
        ax.set_ylabel(f"share of {noun} with a larger loss")
        ax.legend(fontsize=8, loc="upper right")
        lines = [
            f"{name.removesuffix(', %')} {values.estimate}{' %' if name.endswith('%') else ''}"
            for name, (_, values) in self.numbers().items()
        ]
        ax.set_title("\n".join(lines), fontsize=9)
        return ax.figure, ax  # type: ignore[return-value]


def loss_and_error(
    module: nn.Module,
    splits: Mapping[str, Sequence[Batch]],
    *,
    loss: Loss | None = None,
    batch_dim: BatchDim = None,
    seed: int = 0,
    transfer: Callable[[Batch], Batch] | None = None,
) -> LossResult:
    """Measure loss and error rate in eval mode on each split, example by example.

    The loss of one example is that of a batch of one. Where batches cannot be cut, or their loss is not the mean of its
    examples', the scatter between batches is the error bar. Classes are counted where ``module(x)`` of a batch (x, y)
    has the shape (N, C) and y holds N integers.

    Args:
        module: The network, at the weights to measure.
        splits: Batches by name, "train" or "val".
        loss: ``(module, batch) -> scalar``, a mean over the batch. None: cross entropy.
        batch_dim: Dimension of the tensors that counts examples. None: that of the one size that they share.
        seed: Of what a loss draws.
        transfer: Moves a batch to the device. None: a plain copy.

    Returns:
        The numbers, with error bars.

    Example:
        >>> batch = torch.tensor([[0.0, 9.0], [0.0, 9.0]]), torch.tensor([1, 0])      # one right, one wrong
        >>> found = loss_and_error(nn.Sequential(nn.Linear(2, 2)), {"val": [batch]},
        ...                        loss=lambda m, b: (m[0].weight.sum() * 0 + b[1].float()).mean())
        >>> found.numbers()["validation loss"][1].estimate.value
        0.5
    """
    found = {}
    for split, batches in splits.items():
        with untouched(module, "eval", seed):
            surface = LossSurface(module, batches, loss=loss, batch_dim=batch_dim, seed=seed, transfer=transfer)
            with torch.no_grad():
                found[split] = _measure(surface, loss or cross_entropy)
    return LossResult(found)


def _measure(surface: LossSurface, loss: Loss) -> SplitLoss:
    by_example: list[Tensor] | None = []
    by_batch, wrong = [], []
    for batch in surface.batches:
        mean = surface.batch_loss(surface.weights, batch).double()
        scores = _class_scores(surface, batch)
        by_batch.append(mean)
        if scores is not None:
            wrong.append((scores.argmax(1) != batch[1]).double())
        if by_example is not None:
            single = _singles(surface, batch, mean, scores if loss is cross_entropy else None)
            by_example = None if single is None else [*by_example, single]
    n = surface.examples
    alike = np.full(n, 1 / n)
    if by_example is None:
        losses = GroupValues(torch.stack(by_batch).cpu().numpy(), np.array(surface.shares))
    else:
        losses = GroupValues(torch.cat(by_example).cpu().numpy(), alike)
    wrongly = GroupValues(torch.cat(wrong).cpu().numpy(), alike) if len(wrong) == len(surface.batches) else None
    return SplitLoss(n, losses, wrongly, "batch" if by_example is None else "example")


def _singles(surface: LossSurface, batch: Batch, mean: Tensor, scores: Tensor | None) -> Tensor | None:
    """Return the loss of each example of a batch, or None where it is not what the batch's loss is a mean of."""
    if scores is not None:
        values = nn.functional.cross_entropy(scores, batch[1], reduction="none").double()
    else:
        try:
            parts = [surface.layout.cut(batch, i, i + 1) for i in range(surface.layout.size(batch))]
            values = torch.stack([surface.batch_loss(surface.weights, part).double() for part in parts])
        except (ValueError, RuntimeError):  # a batch that cannot be cut, or a module that takes no batch of one
            return None
    close = (values.mean() - mean).abs() <= 1e-3 * mean.abs() + 1e-6
    return values if bool(close) else None


def _class_scores(surface: LossSurface, batch: Batch) -> Tensor | None:
    """Return ``module(x)`` where it scores the classes of a batch (x, y), else None."""
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        return None
    x, y = batch
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        return None
    try:
        scores = surface.apply(lambda module, given: module(given), surface.weights, x, None)
    except (TypeError, ValueError, AttributeError, RuntimeError):  # a forward of another kind, or none
        return None
    if not (isinstance(scores, Tensor) and scores.ndim == 2 and len(scores) == len(y) and scores.is_floating_point()):
        return None
    return scores if scores.shape[1] > 1 and int(y.min()) >= 0 and int(y.max()) < scores.shape[1] else None
