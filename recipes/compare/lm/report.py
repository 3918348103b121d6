"""The results of a study of the language model: results.csv, table.md, task.json and bytes.png."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from recipes.compare.lm.methods import METHODS, OUTER_LR, Arm, ddp_like
from recipes.compare.lm.speed import LINKS, link_seconds
from recipes.compare.lm.study import THROTTLED, Chosen, Record, Study
from recipes.data.cache import write

LIGHTNING = (
    "Lightning's own local SGD (`DDPStrategy(ddp_comm_hook=post_localSGD_hook, model_averaging_period=H)`) has no row: "
    "Lightning registers communication hooks on CUDA alone. On a CPU the gradients would be averaged at every step, "
    "and the row would be DDP's, with an average of equal weights on top."
)


def report(
    study: Study, chosen: Chosen, final: Sequence[Record], timed: Sequence[Record], seconds: Mapping[Arm, float]
) -> None:
    """Write ``results.csv`` (every training), ``table.md``, ``task.json`` and ``bytes.png`` into the study's folder."""
    about = {"task": asdict(study.task)} | {key: final[0][key] for key in ("parameters", "text", "versions")}
    texts = {
        "results.csv": results_csv(final, timed),
        "table.md": tables(study, chosen, final, timed, seconds),
        "task.json": json.dumps(about, indent=1) + "\n",
    }
    for name, text in texts.items():
        write(study.out / name, lambda file, text=text: file.write(text.encode()))
    figure = picture(study, final)
    write(study.out / "bytes.png", lambda file: figure.savefig(file, format="png", dpi=150))


def results_csv(final: Sequence[Record], timed: Sequence[Record]) -> str:
    """Return a line for every training."""
    rows: list[dict[str, Any]] = []
    for budget, records in (("equal tokens", final), ("equal time", timed)):
        for record in records:
            run = record["run"]
            settings = json.dumps(run["settings"])
            row = {"budget": budget, **run["arm"], "settings": settings, "seed": run["seed"], "steps": run["steps"]}
            rows.append(row | {key: record[key] for key in ("tokens", "val_loss", "bytes_per_token", "seconds")})
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def tables(
    study: Study, chosen: Chosen, final: Sequence[Record], timed: Sequence[Record], seconds: Mapping[Arm, float]
) -> str:
    """Return the tables in Markdown: replicas at equal tokens and at equal time, one replica, how to read them."""
    arms = study.arms()
    parts = [_replicas(study, chosen, [arm for arm in arms if arm.replicas > 1], final, seconds)]
    parts += [_timed(study, final, timed)] if timed else []
    parts += [_alone(chosen, [arm for arm in arms if arm.replicas == 1], final)]
    parts += ["\n".join(_notes(study, final))]
    return "\n\n".join(part for part in parts if part) + "\n"


HEIGHT_POINTS, NAME_POINTS = 250, 13  # about: from the lowest to the highest dot of the picture, and of a name in it


def picture(study: Study, final: Sequence[Record]) -> Figure:
    """Draw loss against bytes: a dot for each arm of the central number of replicas, named beside it.

    The large dot is the method at the centre, the small ones its other inner steps and formats. A line is DDP's loss.
    """
    arms = [arm for arm in study.arms() if arm.replicas == study.center[0]]
    names = list(dict.fromkeys(arm.method for arm in arms))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    points = [(_mean(final, arm, "val_loss"), _mean(final, arm, "bytes_per_token"), arm) for arm in arms]
    points = sorted((p for p in points if math.isfinite(p[0]) and p[1]), key=lambda p: p[:2])
    # Methods that send about as much stand one above the other: where two names would lie on each other, one moves up.
    losses = [loss for loss, *_ in points]
    per_point = (max(losses) - min(losses)) / HEIGHT_POINTS if losses else 0
    last = -math.inf  # the height of a name
    for loss, sent, arm in points:
        central = arm == study.central(arm.method)
        color = f"C{names.index(arm.method)}"
        axes.scatter(sent, loss, s=90 if central else 35, color=color, zorder=3)
        name = arm.method
        if arm == ddp_like(arm):
            axes.axhline(loss, color=color, linewidth=1, linestyle="--", alpha=0.6)
            place: dict[str, Any] = {"xytext": (0, 8), "ha": "center", "va": "bottom"}
        elif central:
            last = max(loss, last + NAME_POINTS * per_point)
            up = (last - loss) / per_point if per_point else 0
            place = {"xytext": (18, up), "ha": "left", "va": "center"}
            place["arrowprops"] = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)}
        else:
            name = f"H = {arm.inner_steps}" if arm.format == study.center[2] else arm.format
            place = {"xytext": (0, -6), "ha": "center", "va": "top"}
        size = 10 if central else 8
        axes.annotate(name, (sent, loss), textcoords="offset points", fontsize=size, color=color, zorder=4, **place)
    axes.set(xscale="log", xlabel="bytes sent per token of training", ylabel="validation loss (nats per byte)")
    axes.set_title(f"{study.center[0]} replicas, equal tokens", fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.1)
    return figure


def _replicas(
    study: Study, chosen: Chosen, arms: Sequence[Arm], final: Sequence[Record], seconds: Mapping[Arm, float]
) -> str:
    if not arms:
        return ""
    head = ["method", "replicas", "H", "format", "settings", "validation loss", "of DDP's", "bytes per token"]
    head += ["of DDP's", "tokens/s, no limit", *(f"tokens/s at {link} (utilisation)" for link in LINKS)]
    lines = []
    for arm in arms:
        loss, sent = _mean(final, arm, "val_loss"), _mean(final, arm, "bytes_per_token")
        ddp = [_mean(final, ddp_like(arm), key) for key in ("val_loss", "bytes_per_token")]
        each = sent * study.task.tokens_per_step / arm.replicas  # bytes a step of a replica
        hidden = METHODS[arm.method].hidden(arm.inner_steps)
        free = study.task.tokens_per_step / seconds[arm]
        speeds = [
            study.task.tokens_per_step / link_seconds(seconds[arm], each, bits, hidden=hidden)
            for bits in LINKS.values()
        ]
        cells = [arm.method, arm.replicas, arm.inner_steps or "", arm.format, _settings(chosen[arm.method])]
        cells += [_cell(final, arm), _ratio(loss, ddp[0], "+.2%", 1), _bytes(sent), _ratio(sent, ddp[1], ".2%", 0)]
        cells += [f"{free:,.0f}", *(f"{speed:,.0f} ({speed / free:.1%})" for speed in speeds)]
        lines.append(cells)
    tokens = study.task.steps * study.task.tokens_per_step
    return f"### Replicas at equal tokens: {tokens:,} in {study.task.steps} steps\n\n" + _markdown(head, lines)


def _timed(study: Study, final: Sequence[Record], timed: Sequence[Record]) -> str:
    arms = list(dict.fromkeys(Arm(**record["run"]["arm"]) for record in timed))
    lines = []
    for arm in arms:
        own = [record for record in timed if Arm(**record["run"]["arm"]) == arm]
        cells = [arm.method, arm.inner_steps or "", arm.format, own[0]["run"]["steps"], _cell(timed, arm)]
        lines.append([*cells, _cell(final, arm)])
    head = ["method", "H", "format", "steps in that time", "validation loss", "at equal tokens"]
    title = (
        f"### Equal time at {THROTTLED}, {study.center[0]} replicas: what {study.task.steps} steps of DDP take without "
        "a limit"
    )
    return f"{title}\n\n" + _markdown(head, lines)


def _alone(chosen: Chosen, arms: Sequence[Arm], final: Sequence[Record]) -> str:
    if not arms:
        return ""
    base = _mean(final, Arm("adamw"), "val_loss")
    lines = []
    for arm in arms:
        ratio = _ratio(_mean(final, arm, "val_loss"), base, "+.2%", 1)
        lines.append([arm.method, arm.inner_steps or "", _settings(chosen[arm.method]), _cell(final, arm), ratio])
    head = ["method", "H", "settings", "validation loss", "of AdamW's"]
    return "### One replica, the same tokens\n\n" + _markdown(head, lines)


def _notes(study: Study, final: Sequence[Record]) -> list[str]:
    replicas, inner_steps, format = study.center
    edges = f"{min(study.lrs):g} and {max(study.lrs):g}"
    momenta, finals = (
        ", ".join(f"{value:g}" for value in values) for values in (study.outer_momenta, study.outer_finals)
    )
    return [
        f"Mean +- standard deviation over {study.seeds} seeds (one seed: no deviation). A step's tokens are shared by "
        "the replicas. DDP's is that with the same inner optimizer. Losses are in nats per token, bytes are of all "
        "replicas together and as a ring would send them.",
        f"Every method chose its settings with seed 0, {replicas} replicas, H = {inner_steps} and {format}, of "
        f"{len(study.lrs)} learning rates between {edges} and, with an outer momentum, of "
        f"{momenta}; the outer rate is {OUTER_LR}, at the end of the training that times one of {finals}, to which it "
        f"falls over {study.outer_fall:g} of the training; beta2 is "
        f"{study.task.beta2:g}, and learning rates end at {study.task.final:g} of their largest.",
        "Tokens per second are arithmetic, from the time of a step on one core and the bytes: one core and one link a "
        "replica. DDP's bytes are hidden behind its whole step, which is more than it can; streamed fragments "
        "count as of one size; latency is left out.",
        LIGHTNING,
    ]


def _of(records: Sequence[Record], arm: Arm) -> list[Record]:
    return [record for record in records if Arm(**record["run"]["arm"]) == arm]


def _mean(records: Sequence[Record], arm: Arm, key: str) -> float:
    own = _of(records, arm)
    return mean(record[key] for record in own) if own else math.nan


def _cell(records: Sequence[Record], arm: Arm) -> str:
    losses = [record["val_loss"] for record in _of(records, arm)]
    lost = sum(not math.isfinite(loss) for loss in losses)
    if lost:
        return f"diverged ({lost} of {len(losses)})" if len(losses) > 1 else "diverged"
    return f"{mean(losses):.4f}" + (f" +- {stdev(losses):.4f}" if len(losses) > 1 else "")


def _bytes(sent: float) -> str:
    return f"{sent:,.0f}" if sent >= 100 else f"{sent:.3g}"


def _ratio(value: float, base: float, form: str, less: float) -> str:
    return f"{value / base - less:{form}}" if math.isfinite(value / base if base else math.nan) else ""


def _settings(settings: Mapping[str, float]) -> str:
    names = {"lr": "lr", "outer_momentum": "momentum", "outer_final": "outer rate at the end x", "outer_fall": "over"}
    return ", ".join(f"{names[name]} {value:g}" for name, value in settings.items())


def _markdown(head: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
