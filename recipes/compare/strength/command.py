"""The command line of ``python -m recipes.compare strength``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipes.compare.methods import Method
from recipes.compare.strength.report import Results, report
from recipes.compare.strength.tasks import BASELINE, METHODS, TRIALS
from recipes.compare.study import Study
from recipes.data import ImageData
from recipes.limits import argument
from recipes.messages import Parser


def main(args: Sequence[str]) -> dict[str, Results]:
    """Run a study from the command line, or resume one that was killed; the report grows with every task."""
    options = parse(args)
    results: dict[str, Results] = {}
    studies = {name: make_study(name, options) for name in options.tasks}
    for study in studies.values():  # finds what is wrong with the data before anything is trained
        data = ImageData(**study.task.data)
        data.prepare_data()
        data.setup()
    for name, study in studies.items():
        print(f"{name}: {TRIALS[name].words}", flush=True)
        search = study.train(study.search_runs())
        results[name] = Results(study, search, study.train(study.final_runs(search)))
        report(results, options.out)
    print((options.out / "table.md").read_text())
    return results


def make_study(name: str, options: argparse.Namespace) -> Study:
    """Return the study of a task."""
    trial = TRIALS[name]
    methods = list(dict.fromkeys([BASELINE, *options.methods]))
    return Study(
        task=trial.at(options.root, options.folder, options.precision),
        methods=methods,
        lrs=options.lrs or trial.lrs,
        weight_decays=options.weight_decays or trial.weight_decays,
        seeds=options.seeds,
        out=options.out / name,
        workers=options.workers,
    )


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        "python -m recipes.compare strength",
        description="Does a method help over SGD whose rate and weight decay were searched? Small tasks, on the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TRIALS), default=["mlp", "mlp-wrong40"], metavar="TASK",
        help="; ".join(f"{name}: {trial.words}" for name, trial in TRIALS.items()))  # fmt: skip
    add("--methods", nargs="+", type=_method, default=list(METHODS), metavar="METHOD", help="name:option=value,...")
    add("--lrs", type=argument(float, 1e-9, 1000), nargs="+", help="that every method tries; by default the task's")
    add("--weight_decays", type=argument(float, 0, 1000), nargs="+", help="each with each")
    add("--seeds", type=argument(int, 1, 1000), default=5, help="trainings of each method at its best rate")
    add("--root", default="data", help="folder of torchvision's data sets")
    add("--folder", help="an image folder in the place of CIFAR-10: train/<class>/* and test/<class>/*")
    add("--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="the Trainer's")
    add("--workers", type=argument(int, 0, 1024), default=2, help="trainings at a time; 0: in this process")
    add("--out", type=Path, default=Path("runs/compare/strength"), help="folder for results")
    return parser.parse_args(args)


def _method(text: str) -> str:
    try:
        return Method.parse(text).label
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
