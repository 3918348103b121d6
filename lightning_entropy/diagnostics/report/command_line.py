"""Report on checkpoints from a command line: ``python -m lightning_entropy.diagnostics report CHECKPOINT ...``."""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from jsonargparse.typing import Path_fr

from lightning_entropy.diagnostics.figures import overview
from lightning_entropy.diagnostics.report.findings import (
    COMMON,
    ESTIMATORS,
    GROUPS,
    SECTIONS,
    SPECTRUM,
    VALLEY,
    Findings,
)
from lightning_entropy.diagnostics.report.given_loss import quietly
from lightning_entropy.diagnostics.report.looks import look
from lightning_entropy.diagnostics.report.names import Refused
from lightning_entropy.diagnostics.report.page import Sections, failure, page, unfinished
from lightning_entropy.diagnostics.report.parser import COMMAND, Parser, check_words
from lightning_entropy.diagnostics.report.record import record, source_of
from lightning_entropy.diagnostics.report.subjects import device_of, subjects_of
from lightning_entropy.diagnostics.report.verdict import verdict

_DESCRIPTION = """How flat is the minimum, how loud and how round is the noise, did SGD walk in circles.

A first look takes a minute (--budget), on few examples first; the page is written as it grows, and Ctrl+C keeps it.

The module's hyper-parameters come from the checkpoint (save_hyperparameters), or else, like the data's, from the
config.yaml that LightningCLI left one or two folders above it, or from --config, which alone may name classes;
--module.NAME=VALUE and --data.NAME=VALUE add to them. Estimators take --hessian.NAME=VALUE,
--local_entropy.NAME=VALUE and --gradient_noise.NAME=VALUE.

  python -m lightning_entropy.diagnostics report best.ckpt --module recipes.classifier.Classifier
      --data recipes.data.ImageData --data.source=cifar10 --data.root=data
  python -m lightning_entropy.diagnostics report best.ckpt --module train.py:Net --data train.py:loaders
  python -m lightning_entropy.diagnostics compare first.ckpt second.ckpt --module train.py:Net --data train.py:loaders
"""
_CHECKPOINTS = {"report": 1, "compare": 2}
_PLACE = "package.Class, package:Class or path/train.py:Class"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the command line.

    Args:
        arguments: In place of the process's own.

    Returns:
        Where the page was written.
    """
    start = time.monotonic()
    parser = _parser()
    parsed = parse(arguments, parser)
    command: str = parsed.command
    options: Namespace = parsed[command]
    paths = [options.checkpoint] if command == "report" else [options.first, options.second]
    paths = [Path(path) for path in paths]
    if options.budget is not None and not options.budget > 0:
        parser.error(f"--budget must be > 0 seconds or null, got {options.budget}")
    if options.examples < 1:
        parser.error(f"--examples must be at least 1, got {options.examples}")
    for path in paths:
        if not path.is_file():
            parser.error(f"the checkpoint must be a file, got {path}: there is none")
    output = Path(options.output)
    # A folder that is not there would be found out after all has been measured.
    for name in ("output", "json", "image"):
        if options[name] is not None and not Path(options[name]).absolute().parent.is_dir():
            parser.error(f"--{name} must be in a folder that there is, got {options[name]}")
    with quietly():
        try:
            subjects = subjects_of(options, paths)
        except Refused as error:
            parser.error(str(error))
    findings = [subject.findings for subject in subjects]
    source = source_of(options, paths, subjects, device_of(options))

    sections = Sections()

    def write() -> None:
        _replace(output, page(findings, source=source, sections=sections))
        if options.json is not None:
            _replace(Path(options.json), record(findings, source))

    def tell(words: str) -> None:
        if sys.stderr.isatty():
            print(words, file=sys.stderr)

    with quietly():
        look(
            subjects,
            examples=options.examples,
            budget=options.budget,
            skip=options.skip,
            grown=write,
            tell=tell,
            start=start,
        )
    if not any(found.results for found in findings) and findings[0].failed:
        parser.error(f"nothing could be measured: {next(iter(findings[0].failed.values()))}")
    write()
    if options.image is not None:
        overview({found.title: found.in_order() for found in findings}).savefig(options.image, dpi=120)
    _print(findings)
    print(f"wrote {', '.join(str(options[name]) for name in ('output', 'json', 'image') if options[name] is not None)}")
    return output


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _print(findings: list[Findings]) -> None:
    for found in findings:
        for section, rows in found.rows().items():
            for row in rows:
                print(f"{found.title}  {section:15} {row.name:32} {row}")
    print(
        "± is a 99 % interval: of the choice of examples, random probes and chains. Numbers whose intervals "
        "overlap may be alike; how to read each is on the page"
    )
    first = findings[0]
    for section, reason in first.failed.items():
        print(f"{section}: {failure(reason, section in first.results)}")
    for section, seen in first.left.items():
        print(f"{section}: {unfinished(seen)}")
    if len(findings) == 2:
        print("\n".join(verdict(*findings)))


def parse(arguments: Sequence[str] | None = None, parser: Parser | None = None) -> Namespace:
    """Read the command line, and import nothing that it names.

    ``--module`` is a class, and ``--module.NAME`` sets an item of the dictionary ``--module_settings``.

    Args:
        arguments: In place of the process's own.
        parser: In place of a new one.

    Returns:
        ``command``, and the options under its name.
    """
    words = sys.argv[1:] if arguments is None else arguments
    words = [re.sub(r"^--(module|data)\.", r"--\1_settings.", word) for word in words]
    parser = parser or _parser()
    check_words(words, parser, _CHECKPOINTS)
    return cast("Namespace", parser.parse_args(words))


def _parser() -> Parser:
    report, compare = Parser(), Parser()
    report.add_argument("checkpoint", type=str, help="the checkpoint file")
    compare.add_argument("first", type=str, help="a checkpoint file")
    compare.add_argument("second", type=str, help="another checkpoint file, of the same module and data")
    for command, written in ((report, "diagnostics.html"), (compare, "comparison.html")):
        command.add_argument("--module", type=str, required=True, help=f"the LightningModule: {_PLACE}")
        command.add_argument(
            "--data",
            type=str | None,
            help="a LightningDataModule, or a function that returns a DataLoader, a pair (training, validation) of "
            f"them or a LightningDataModule: {_PLACE}; null: the module's own train_dataloader",
        )
        for name in ("module", "data"):
            command.add_argument(
                f"--{name}_settings",
                type=dict[str, Any] | None,
                help=f"arguments of the {name}'s class or function, each as --{name}.NAME=VALUE",
            )
        command.add_argument("--config", type=Path_fr, help="a LightningCLI's config.yaml, whose classes are imported")
        command.add_argument(
            "--loss",
            type=str | None,
            help="a callable (module, batch) -> scalar, package.name or path/train.py:name; training_step: the "
            "module's own; null: cross entropy of module(x) and y",
        )
        command.add_argument(
            "--split",
            choices=("train", "val"),
            default="train",
            help="the loader to measure on; loss and error are of both",
        )
        command.add_argument("--examples", type=int, default=512, help="examples to measure on, if time allows")
        command.add_argument(
            "--budget",
            type=float | None,
            default=60.0,
            help="seconds from the start: few examples and draws first, more while time is left; what is left out is "
            "said, with the budget that it takes; null: all of --examples at once, however long",
        )
        command.add_argument(
            "--batch_dim",
            type=int | None,
            help="dimension of the tensors that counts examples; null: that of the one size that they share",
        )
        command.add_argument(
            "--mode", choices=("eval", "train"), default="eval", help="of BatchNorm and dropout while measuring"
        )
        command.add_argument("--seed", type=int, default=0, help="of everything drawn")
        command.add_argument("--device", type=str | None, help="where to measure; null: cuda if there is one, else cpu")
        command.add_argument("--skip", nargs="*", default=[], choices=list(SECTIONS), help="sections to leave out")
        command.add_argument("--output", type=str, default=written, help="the page to write; replaced if it is there")
        command.add_argument("--json", type=str | None, help="a file for all numbers, their errors and their source")
        command.add_argument("--image", type=str | None, help="a file (png, pdf, svg) for all pictures in one")
        for name, estimator in ESTIMATORS.items():
            command.add_function_arguments(estimator, name, skip=set(COMMON))
        command.set_defaults({f"{name}.groups": GROUPS for name in ESTIMATORS})
        command.set_defaults({f"hessian.{name}": value for name, value in SPECTRUM.items()})
        command.set_defaults({f"local_entropy.{name}": value for name, value in VALLEY.items()})
    parser = Parser(prog=COMMAND, description=_DESCRIPTION)
    commands = parser.add_subcommands(dest="command", required=True)
    for name, command, words in (("report", report, "one checkpoint"), ("compare", compare, "two side by side")):
        commands.add_subcommand(name, command, help=words)
        parser.options[name] = {"--help", *(f"--{key}" for key in vars(command.get_defaults().as_flat()))}
    return parser
