"""What a strength study has found: ``table.md``, ``results.csv`` and ``strength.png``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from recipes.compare.report import edged, results_csv
from recipes.compare.strength.tasks import BASELINE, TRIALS
from recipes.compare.study import Study
from recipes.data.cache import write

Record = dict[str, Any]
LEVEL = 0.95  # of the intervals

# heading, name of a measurement, decimals
COLUMNS = (
    ("test error (%)", "test_error", 2),
    ("test loss", "test_loss", 3),
    ("calibration error", "calibration_error", 3),
    ("error, corrupted images (%)", "corrupted_error", 2),
    ("error, 60 % of the weights pruned (%)", "pruned_error", 2),
    ("train error (%)", "train_error", 2),
    ("ms a gradient", "gradient_ms", 1),
)
DRAWN = COLUMNS[:3]


class Difference(NamedTuple):
    """A mean difference with its interval.

    Attributes:
        mean: of the pairs.
        margin: half the interval's width; nan with one pair.
    """

    mean: float
    margin: float

    @property
    def found(self) -> bool:
        """Whether the interval excludes zero."""
        return abs(self.mean) > self.margin


class Results(NamedTuple):
    """A task's trainings."""

    study: Study
    search: Sequence[Record]
    final: Sequence[Record]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Return the mean of the differences of pairs, seed by seed, with Student's interval.

    Example:
        >>> [round(number, 2) for number in paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])]
        [2.0, 2.48]
    """
    differences = np.subtract(ours, theirs)
    if len(differences) < 2:
        return Difference(float(differences.mean()), math.nan)
    error = differences.std(ddof=1) / len(differences) ** 0.5
    return Difference(float(differences.mean()), float(stats.t.ppf((1 + LEVEL) / 2, len(differences) - 1) * error))


def report(results: Mapping[str, Results], out: Path) -> None:
    """Write the table, every training, and the picture into a folder."""
    text = table(results)
    write(out / "table.md", lambda file: file.write(text.encode()))
    for name, (_, search, final) in results.items():
        lines = results_csv(search, final)
        write(out / name / "results.csv", lambda file, lines=lines: file.write(lines.encode()))
    figure = picture(results)
    write(out / "strength.png", lambda file: figure.savefig(file, format="png", dpi=150))


def table(results: Mapping[str, Results]) -> str:
    """Return a table a task in Markdown, and how it was made."""
    parts = []
    for name, found in results.items():
        parts.append(f"### {name}: {TRIALS[name].words}\n\n{_rows(found)}")
    study, _, final = next(iter(results.values()))
    parts.append(
        f"Mean +- standard deviation over {study.seeds} seeds. Behind it the mean "
        f"difference to {BASELINE} of the same seed with its {100 * LEVEL:.0f} % interval, or '=' where that holds 0: "
        "no difference is shown. Every method tried the same learning rates with the same weight decays, with seed 0, "
        "and kept what had the least error on held-out images whose labels are right; * marks a choice at the edge. "
        "Equal gradient evaluations for all: SAM makes half the steps. BatchNorm's statistics are re-estimated in one "
        "way for all. Milliseconds are of a gradient evaluation, all replicas together, beside whatever else ran."
    )
    tasks = {name: asdict(found.study.task) for name, found in results.items()}
    parts.append("```json\n" + json.dumps({"tasks": tasks, "versions": final[0]["versions"]}, indent=1) + "\n```")
    return "\n\n".join(parts) + "\n"


def _rows(found: Results) -> str:
    study, search, final = found
    chosen = study.chosen(search)
    lines = [
        "| method | lr | weight decay | " + " | ".join(heading for heading, _, _ in COLUMNS) + " |",
        "|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for label, kind in study.arms():
        lr, decay = chosen[label, kind]
        cells = [label, edged(lr, study.lrs), edged(decay, study.weight_decays)]
        cells += [_cell(final, label, column) for column in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(final: Sequence[Record], label: str, column: tuple[str, str, int]) -> str:
    _, key, decimals = column
    own, base = values(final, label, key), values(final, BASELINE, key)
    if any(math.isnan(v) for v in own):
        return "diverged"
    text = f"{np.mean(own):.{decimals}f}"
    if len(own) > 1:
        text += f" +- {np.std(own, ddof=1):.{decimals}f}"
    if label == BASELINE or len(own) < 2 or any(math.isnan(v) for v in base):
        return text
    difference = paired(own, base)
    if not difference.found:
        return f"{text} (=)"
    return f"{text} ({difference.mean:+.{decimals}f} +- {difference.margin:.{decimals}f})"


def values(final: Sequence[Record], label: str, key: str) -> list[float]:
    """Return a measurement of a method's trainings, in the order of the seeds."""
    records = sorted((r for r in final if r["run"]["method"] == label), key=lambda r: r["run"]["seed"])
    if key == "gradient_ms":
        return [1000 * r["seconds"] / r["gradient_evaluations"] for r in records]
    return [r["final"][key] for r in records]


def picture(results: Mapping[str, Results]) -> Figure:
    """Draw every method's difference to the baseline, a dot with its interval: a row a task; left is better."""
    labels = [label for label, _ in next(iter(results.values())).study.arms() if label != BASELINE]
    figure = Figure(figsize=(11, 1.2 + (0.3 * len(labels) + 0.7) * len(results)), layout="constrained")
    grid = figure.subplots(len(results), len(DRAWN), squeeze=False, sharey=True)
    for row, (name, (_, _, final)) in zip(grid, results.items(), strict=True):
        for axis, (heading, key, _) in zip(row, DRAWN, strict=True):
            base = values(final, BASELINE, key)
            for place, label in enumerate(labels):
                own = values(final, label, key)
                if any(math.isnan(v) for v in [*own, *base]):
                    continue
                mean, margin = paired(own, base)
                better = "C2" if mean < 0 else "C3"
                colour = better if abs(mean) > margin else "0.55"
                axis.errorbar(mean, place, xerr=None if math.isnan(margin) else margin, fmt="o", color=colour, ms=4)
            axis.axvline(0, color="0.3", linewidth=0.8)
            axis.set_title(f"{name}: {heading} less {BASELINE}'s", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.tick_params(labelsize=7)
            axis.grid(axis="x", alpha=0.25, linewidth=0.5)
        row[0].set_yticks(range(len(labels)), labels, fontsize=7)
    grid[0, 0].invert_yaxis()  # all share it
    return figure
