"""``python -m recipes.compare allcnn --methods sgd entropy_sgd --seeds 3 --epochs 30``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.compare.lm.command import main as language_model
from recipes.compare.lm.study import Study as LanguageStudy
from recipes.compare.methods import METHODS
from recipes.compare.report import report
from recipes.compare.run import Task
from recipes.compare.strength.command import main as strength
from recipes.compare.strength.report import Results
from recipes.compare.study import Study
from recipes.data import ImageData
from recipes.limits import argument
from recipes.messages import Parser, refusing, run

# What each net is trained on unless the command line says otherwise: the papers' data and weight decay.
DEFAULTS: dict[str, dict[str, Any]] = {
    "allcnn": {"source": "cifar10", "weight_decay": 1e-3, "crop": 4, "flip": True, "dropout": 0.0},
    "wide_resnet": {"source": "cifar10", "weight_decay": 5e-4, "crop": 4, "flip": True, "dropout": 0.0},
    "resnet": {"source": "cifar10", "weight_decay": 5e-4, "crop": 4, "flip": True, "dropout": 0.0},
    "lenet": {"source": "fashion_mnist", "weight_decay": 0.0, "crop": 0, "flip": False, "dropout": 0.25},
}

# Small enough for two CPU cores, and trained to zero error: few images, a narrow net, no augmentation or dropout.
SMALL: dict[str, dict[str, Any]] = {
    "allcnn": {"width": 48, "n_train": 4000, "n_val": 2000, "crop": 0, "flip": False, "precision": "bf16-mixed"},
    "wide_resnet": {"depth": 10, "width": 1, "n_train": 4000, "n_val": 2000, "crop": 0, "flip": False},
    "resnet": {"width": 16, "n_train": 4000, "n_val": 2000, "crop": 0, "flip": False},
    "lenet": {"n_train": 4000, "n_val": 4000, "dropout": 0.0},
}


def main(args: Sequence[str] | None = None) -> Study | LanguageStudy | dict[str, Results]:
    """Run a comparison from the command line, or resume one that was killed."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] == "lm":
        return language_model(args[1:])
    if args and args[0] == "strength":
        return strength(args[1:])
    options = _parse(args)
    task = Task(
        net=options.net,
        net_args=_net_args(options),
        data={
            name: getattr(options, name)
            for name in ("source", "root", "batch_size", "normalise", "flip", "crop", "n_train", "n_val")
        },
        epochs=options.epochs,
        weight_decay=options.weight_decay,
        warmup=options.warmup,
        points=options.points,
        precision=options.precision,
        compile=options.compile,
        accelerator=options.accelerator,
    )
    with refusing():
        study = Study(
            task=task,
            methods=options.methods,
            lrs=options.lrs,
            weight_decays=options.weight_decays or [None],
            seeds=options.seeds,
            budgets=options.budgets,
            out=options.out or Path("runs/compare") / options.net,
            workers=options.workers,
        )
        # Once, before anything is trained: downloads, decodes, and finds what is wrong with the data.
        data = ImageData(**task.data)
        data.prepare_data()
        data.setup()
    search = study.train(study.search_runs())
    final = study.train(study.final_runs(search))
    report(study, search, final)
    print((study.out / "table.md").read_text())
    return study


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m recipes.compare",
        epilog="'python -m recipes.compare lm' compares low-communication methods on a language model; its options "
        "are others: 'python -m recipes.compare lm --help'. So are those of 'python -m recipes.compare strength', "
        "which asks of many methods on several tasks whether they help at all.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("net", choices=list(DEFAULTS), help="to train")
    add("--methods", nargs="+", default=["sgd", "entropy_sgd"], help=f"of {', '.join(METHODS)}; name:option=value,...")
    add("--seeds", type=argument(int, 1, 1000), default=3, help="trainings of each method at its best rate")
    add(
        "--epochs",
        type=argument(int, 1, 10**6),
        default=30,
        help="passes over the data, counting every gradient evaluation",
    )
    add(
        "--lrs",
        type=argument(float, 1e-9, 1000),
        nargs="+",
        default=[0.03, 0.1, 0.3],
        help="learning rates every method tries; one: no search",
    )
    add("--weight_decays", type=argument(float, 0, 1000), nargs="+", help="that every method tries with each rate")
    add("--budgets", nargs="+", choices=["compute", "steps"], default=["compute"], help="tables of replicated methods")
    add("--small", action="store_true", help="a small task for two CPU cores, trained to zero training error")
    add("--source", help="data set, or folder of images", default="cifar10")
    add("--root", default="data", help="folder of the data set")
    add("--n_train", type=argument(int, 1, 10**7), help="training images; none: all that n_val leaves")
    add(
        "--n_val",
        type=argument(int, 1, 10**7),
        default=5000,
        help="training images held out to choose learning rates and draw curves",
    )
    add("--batch_size", type=argument(int, 1, 10**6), default=128, help="images of a step")
    add("--normalise", choices=["mean_std", "gcn_zca"], default="mean_std", help="of the pixels")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the training images")
    add("--crop", type=argument(int, 0, 1000), default=4, help="pixels that training images are shifted by at most")
    add("--width", type=argument(int, 1, 1000), help="of All-CNN (96), Wide-ResNet (4), ResNet-18 (64)")
    add("--depth", type=argument(int, 10, 1000), help="of Wide-ResNet (16)")
    add("--dropout", type=argument(float, 0, 0.99), default=0.0, help="share of units")
    add("--weight_decay", type=argument(float, 0, 1000), default=1e-3, help="of every method, without --weight_decays")
    add("--warmup", type=argument(float, 0, 0.99), default=0.05, help="share of training before the cosine")
    add("--points", type=argument(int, 1, 10_000), default=10, help="points of a curve")
    add("--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="the Trainer's")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the net")
    add("--accelerator", default="auto", help="the Trainer's")
    add("--workers", type=argument(int, 0, 1024), default=1, help="trainings at a time; 0: in this process")
    add("--out", type=Path, help="folder for results (runs/compare/<net>)")
    # Not by this parser, which would print its help with the wrong defaults.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("net", nargs="?", default="allcnn")
    first.add_argument("--small", action="store_true")
    known, _ = first.parse_known_args(args)
    if known.net in DEFAULTS:
        parser.set_defaults(**DEFAULTS[known.net] | (SMALL[known.net] | {"workers": 2} if known.small else {}))
    return parser.parse_args(args)


def _net_args(options: argparse.Namespace) -> dict[str, Any]:
    if options.net == "lenet":
        return {"dropout": options.dropout}
    if options.net == "allcnn":
        # The papers drop a fifth of the input with the net's dropout, and nothing without it.
        return {"width": _or(options.width, 96), "dropout": options.dropout, "input_dropout": 0.4 * options.dropout}
    if options.net == "resnet":
        return {"width": _or(options.width, 64)}
    return {"depth": _or(options.depth, 16), "width": _or(options.width, 4), "dropout": options.dropout}


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def _end(*_: Any) -> None:
    """Exit as on Ctrl-C, which ends the trainings, too."""
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    run(main)
