"""The command line of ``python -m recipes.compare lm``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipes.compare.lm.methods import FALL, FORMATS, METHODS
from recipes.compare.lm.report import report
from recipes.compare.lm.run import Task
from recipes.compare.lm.speed import step_seconds
from recipes.compare.lm.study import Study
from recipes.limits import argument
from recipes.messages import Parser, refusing

CHOICES = (
    "methods",
    "replicas",
    "inner_steps",
    "formats",
    "lrs",
    "outer_momenta",
    "outer_finals",
    "outer_fall",
    "seeds",
)

# Minutes on two cores: a tiny net, few steps, one seed, a method of each kind.
QUICK = {
    "steps": 60,
    "n_layer": 1,
    "n_embd": 32,
    "batch_size": 16,
    "val_windows": 64,
    "methods": ["adamw", "snoo", "ddp", "diloco", "elastic_sgd"],
    "vary": ["ddp", "diloco"],
    "replicas": [2, 4],
    "inner_steps": [10],
    "formats": ["float32", "int8"],
    "lrs": [0.01],
    "outer_finals": [1.0],
    "seeds": 1,
    "out": Path("runs/compare/lm-quick"),
}


def main(args: Sequence[str]) -> Study:
    """Run a comparison from the command line, or resume one that was killed."""
    options = parse(args)
    with refusing():
        study = Study(
            task=Task(
                net={name: getattr(options, name) for name in ("n_layer", "n_head", "n_embd", "block_size")},
                files=options.files,
                batch_size=options.batch_size,
                val_windows=options.val_windows,
                steps=options.steps,
                final=options.final,
                beta2=options.beta2,
            ),
            **{name: getattr(options, name) for name in CHOICES},
            vary=options.methods if options.vary is None else options.vary,
            out=options.out,
            workers=options.workers,
        )
        study.task.data(1, 0).setup()  # finds what is wrong with the text before anything is trained
    seconds = step_seconds(study.task, study.arms(), study.out / "seconds.json")
    chosen = study.chosen(study.train(study.search_runs()))
    final = study.train(study.final_runs(chosen))
    timed = study.train(study.timed_runs(chosen, study.timed_steps(final, seconds)))
    report(study, chosen, final, timed, seconds)
    print((study.out / "table.md").read_text())
    return study


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        "python -m recipes.compare lm",
        description="Validation loss beside bytes sent, for a small language model, on the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a small version that runs in minutes")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--vary", nargs="*", choices=list(METHODS), metavar="METHOD",
        help="methods that are also trained away from the middle number of replicas and of inner steps and the first "
        "format, one of them changed at a time; all of --methods if not given")  # fmt: skip
    add("--replicas", type=argument(int, 2, 256), nargs="+", default=[2, 4, 8], help="the others train one")
    add("--inner_steps", type=argument(int, 1, 10**6), nargs="+", default=[10, 30, 100], help="H")
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="of what replicas send")
    add("--lrs", type=argument(float, 1e-9, 1000), nargs="+", default=[1e-3, 3e-3, 1e-2], help="that methods try")
    add("--outer_momenta", type=argument(float, 0, 0.999), nargs="+", default=list(Study.outer_momenta),
        help="that methods with an outer Nesterov step try")  # fmt: skip
    add("--outer_finals", type=argument(float, 1e-6, 1), nargs="+", default=[1.0, 0.3],
        help="what outer learning rates fall to, in their first value; 1: constant")  # fmt: skip
    add(
        "--outer_fall", type=argument(float, 1e-6, 0.999), default=FALL, help="share of the training over which they do"
    )
    add("--final", type=argument(float, 0, 1), default=0.1, help="learning rate at the end, over the largest")
    add("--beta2", type=argument(float, 0, 0.999999), default=0.95, help="of AdamW")
    add("--seeds", type=argument(int, 1, 1000), default=3, help="trainings of each at its best rate")
    add("--steps", type=argument(int, 1, 10**9), default=900, help="of a training, warm-up included")
    add("--batch_size", type=argument(int, 1, 10**6), default=32, help="windows of a step, all replicas together")
    add("--val_windows", type=argument(int, 1, 10**7), default=512, help="held out")
    add("--files", nargs="+", help="the text; the standard library's sources if not given")
    add("--n_layer", type=argument(int, 1, 1000), default=3, help="blocks of the net")
    add("--n_head", type=argument(int, 1, 1000), default=2, help="heads of a block")
    add("--n_embd", type=argument(int, 1, 10**5), default=64, help="width of the net")
    add("--block_size", type=argument(int, 1, 10**6), default=64, help="tokens of a window")
    add("--workers", type=argument(int, 0, 1024), default=2, help="trainings at a time; 0: in this process")
    add("--out", type=Path, default=Path("runs/compare/lm"), help="folder for results")
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--quick", action="store_true")
    if first.parse_known_args(args)[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(args)
