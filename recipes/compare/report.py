"""The results of a study: results.csv, table.md, task.json, errors.png and curves.png."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.compare.study import Study
from recipes.data.cache import write

Record = dict[str, Any]
Curve = list[dict[str, float]]

TITLES = {
    "compute": "Equal compute: the same number of gradient evaluations for all, shared by replicas",
    "steps": "Equal steps per replica: n replicas spend n times the gradient evaluations",
}

# heading, key of the record, format of the mean; the three errors in per cent
COLUMNS = (
    ("test error, running statistics (%)", "final.test_error_running", ".2f"),
    ("test error, re-estimated (%)", "final.test_error", ".2f"),
    ("train error (%)", "final.train_error", ".2f"),
    ("loss rise under weight noise", "final.loss_rise", ".3f"),
    ("gradient evaluations", "gradient_evaluations", ".0f"),
    ("images/s", "images_per_second", ".0f"),
    ("training (s)", "seconds", ".0f"),
    ("peak memory of all processes (MiB)", "peak_memory_mib", ".0f"),
)


def report(study: Study, search: Sequence[Record], final: Sequence[Record]) -> None:
    """Write the results into the study's folder.

    They are ``results.csv`` (every training), ``table.md``, ``task.json`` (what was trained on what, and the versions),
    ``errors.png`` (a dot a method) and ``curves.png``.
    """
    task = {"task": asdict(study.task), "versions": final[0]["versions"]}
    for name, text in (
        ("results.csv", results_csv(search, final)),
        ("table.md", table(study, search, final)),
        ("task.json", json.dumps(task, indent=1) + "\n"),
    ):
        write(study.out / name, lambda file, text=text: file.write(text.encode()))
    for name, figure in (("errors.png", errors(final)), ("curves.png", curves(final))):
        write(study.out / name, lambda file, figure=figure: figure.savefig(file, format="png", dpi=150))


def results_csv(search: Sequence[Record], final: Sequence[Record]) -> str:
    """Return a line for every training; one that both chose a learning rate and is compared has two."""
    rows = []
    for role, records in (("search", search), ("final", final)):
        for record in records:
            run = record["run"]
            row = {"role": role} | {key: run[key] for key in ("method", "budget", "lr", "seed")}
            row |= {key: record[key] for key in ("steps", "replicas", "parameters")}
            row |= {f"final_{key}": value for key, value in record["final"].items()}
            row |= {
                key: record[key] for key in ("gradient_evaluations", "images_per_second", "seconds", "peak_memory_mib")
            }
            rows.append(row | record["versions"])
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(study: Study, search: Sequence[Record], final: Sequence[Record]) -> str:
    """Return the tables in Markdown: one for each kind of budget, then the search, then how to read them."""
    parts = []
    chosen = study.chosen(search)
    decays = len(study.weight_decays) > 1
    for kind in study.budgets:
        labels = [label for label, budget in study.arms() if budget == kind]
        lines = [
            f"| method | lr {'| weight decay ' * decays}| " + " | ".join(heading for heading, _, _ in COLUMNS) + " |",
            "|---|---|" + "---|" * (len(COLUMNS) + decays),
        ]
        for label in labels:
            records = _of(final, label, kind)
            cells = [_cell([_get(record, key) for record in records], form) for _, key, form in COLUMNS]
            found = [edged(chosen[label, kind].lr, study.lrs)]
            found += [edged(chosen[label, kind].weight_decay, study.weight_decays)] * decays
            lines.append(f"| {label} | {' | '.join([*found, *cells])} |")
        parts.append(f"### {TITLES[kind]}\n\n" + "\n".join(lines))
    notes = [
        f"Mean +- standard deviation over {study.seeds} seeds (one seed: no deviation).",
        "Errors with BatchNorm's running statistics, and with statistics re-estimated on training images in one way for"
        " all; train error and loss rise with the latter.",
    ]
    if len(study.settings()) > 1:
        tried = ", ".join(f"{lr:g}" for lr in study.lrs)
        each = f", each with the weight decays {', '.join(f'{wd:g}' for wd in study.weight_decays)}," if decays else ""
        notes.append(
            f"Each method tried the learning rates {tried}{each} once, with seed 0, and kept what had the least"
            " held-out error. * marks a choice at the edge of the range."
        )
        parts.append(_search_table(study, search))
    parts.append("\n".join(notes))
    return "\n\n".join(parts) + "\n"


def edged(value: float | None, tried: Sequence[float | None]) -> str:
    """Return a chosen value, with a star at the edge of what was tried; "-" where nothing was chosen."""
    if value is None:
        return "-"
    values = [v for v in tried if v is not None]
    edge = "*" if len(values) > 1 and value in (min(values), max(values)) else ""
    return f"{value:g}{edge}"


def errors(final: Sequence[Record]) -> Figure:
    """Draw the test error of every method as a dot with its standard deviation, the best one on top.

    Small dots are the seeds. A method of which a training has diverged stands below the others, without a dot.
    """
    arms = dict.fromkeys((record["run"]["method"], record["run"]["budget"]) for record in final)
    values = {arm: np.array([_get(r, "final.test_error") for r in _of(final, *arm)]) for arm in arms}
    # Best last: the axis counts upward.
    order = sorted(values, key=lambda arm: np.nan_to_num(values[arm].mean(), nan=np.inf), reverse=True)
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(order)), layout="constrained")
    axis = figure.subplots()
    for y, arm in enumerate(order):
        seeds = values[arm]
        if np.isnan(seeds).any():
            axis.annotate("diverged", (0.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=9)
            continue
        spread = seeds.std(ddof=1) if len(seeds) > 1 else 0.0
        axis.errorbar(seeds.mean(), y, xerr=spread, fmt="o", color="C0", markersize=7, capsize=3)
        axis.plot(seeds, [y] * len(seeds), ".", color="0.6", markersize=4, zorder=0)
    axis.set_yticks(range(len(order)), [_title(*arm) for arm in order])
    axis.set_ylim(-0.6, len(order) - 0.4)
    how = "mean and standard deviation over the seeds"
    axis.set_xlabel(f"test error, re-estimated statistics (%): left is better\n{how}")
    axis.grid(axis="x", alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def curves(final: Sequence[Record]) -> Figure:
    """Draw held-out error against effective epochs and wall-clock, with running and with re-estimated statistics.

    A line for each method, the mean over its seeds; the band is one standard deviation.
    """
    arms = list(dict.fromkeys((record["run"]["method"], record["run"]["budget"]) for record in final))
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True, sharex="col")
    ends = [e for e in (record["curve"][-1]["val_error"] for record in final) if e == e] or [100.0]
    rows = (("val_error_running", "running statistics"), ("val_error", "re-estimated statistics"))
    columns = (("epochs", "effective epochs"), ("seconds", "training (s)"))
    for row, (key, title) in zip(axes, rows, strict=True):
        for axis, (x, unit) in zip(row, columns, strict=True):
            for i, (label, kind) in enumerate(arms):
                style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
                _line(axis, [record["curve"] for record in _of(final, label, kind)], x, key, _title(label, kind), style)
            axis.set_title(f"BatchNorm: {title}", fontsize=10)
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel(unit)
            axis.label_outer()
        row[0].set_ylabel("held-out error (%)")
    # The first epochs are worth less than the differences at the end.
    axes[0, 0].set_ylim(0.9 * min(ends), min(100.0, 2 * float(np.median(ends)) + 1))
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return figure


def _line(axis: Axes, curves: Sequence[Curve], x: str, key: str, label: str, style: dict[str, str]) -> None:
    curves = [curve for curve in curves if curve[-1]["val_error"] == curve[-1]["val_error"]]  # has not diverged
    if not curves:
        return
    points = min(map(len, curves))
    across = np.mean([[point[x] for point in curve[:points]] for curve in curves], 0)
    errors = np.array([[point[key] for point in curve[:points]] for curve in curves])
    mean, deviation = errors.mean(0), errors.std(0, ddof=1) if len(errors) > 1 else np.zeros(points)
    axis.plot(across, mean, label=label, linewidth=1.5, **style)
    axis.fill_between(across, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, linewidth=0)


def _title(label: str, kind: str) -> str:
    return label if kind == "compute" else f"{label}, equal steps"


def _search_table(study: Study, search: Sequence[Record]) -> str:
    settings = study.settings()
    heads = [f"lr {s.lr:g}" + ("" if s.weight_decay is None else f", wd {s.weight_decay:g}") for s in settings]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for label, kind in study.arms():
        errors = {
            (record["run"]["lr"], record["run"]["weight_decay"]): record["final"]["val_error"]
            for record in _of(search, label, kind)
        }
        lines.append(f"| {_title(label, kind)} | " + " | ".join(_cell([errors[s]], ".2f") for s in settings) + " |")
    return "### The search: held-out error (%), re-estimated statistics, one seed\n\n" + "\n".join(lines)


def _of(records: Sequence[Record], label: str, kind: str) -> list[Record]:
    return [r for r in records if (r["run"]["method"], r["run"]["budget"]) == (label, kind)]


def _get(record: Record, key: str) -> float:
    for part in key.split("."):
        record = record[part]
    return float(record)  # type: ignore[arg-type]


def _cell(values: Sequence[float], form: str) -> str:
    lost = int(np.isnan(values).sum())
    if lost:
        return f"diverged ({lost} of {len(values)})" if len(values) > 1 else "diverged"
    mean = f"{np.mean(values):{form}}"
    deviation = f"{np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{mean} +- {deviation}" if deviation.strip("0.") else mean
