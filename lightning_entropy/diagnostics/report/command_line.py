"""Report on checkpoints from a command line: ``python -m lightning_entropy.diagnostics report CHECKPOINT ...``."""

import importlib
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import Path_fr

from lightning_entropy.diagnostics.report.findings import ESTIMATORS, SECTIONS, VALLEY, Subject, look
from lightning_entropy.diagnostics.report.page import page, unfinished, verdict
from lightning_entropy.version import __version__

COMMAND = "python -m lightning_entropy.diagnostics"
_DESCRIPTION = """How flat is the minimum, how loud and how round is the noise, did SGD walk in circles.

A first look takes a minute (--budget), on few examples first; the page is written as it grows, and Ctrl+C keeps it.

The module's hyper-parameters come from the checkpoint (save_hyperparameters), or else, like the data's, from the
config.yaml that LightningCLI left one or two folders above it, or from --config, which alone may name classes;
--module.NAME=VALUE and --data.NAME=VALUE add to them. Estimators take --hessian.NAME=VALUE,
--local_entropy.NAME=VALUE and --gradient_noise.NAME=VALUE.

  python -m lightning_entropy.diagnostics report best.ckpt --module recipes.classifier.Classifier
      --data recipes.data.ImageData --data.source=cifar10 --data.root=data
"""
# What the report itself says, or says once for all estimators.
_COMMON = {"module", "data", "loss", "examples", "batch_dim", "mode", "seed", "state", "transfer", "progress"}


class Parser(ArgumentParser):
    """jsonargparse's, whose errors are a sentence and no page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the process with the message.

        Raises:
            SystemExit: with status 2; or jsonargparse's own error, for whoever has asked for it.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"error: {' '.join(message.split())}\n{COMMAND} report --help lists the options\n")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the command line.

    Args:
        arguments: In place of the process's own.

    Returns:
        Where the page was written.
    """
    parser = _parser()
    parsed = parse(arguments, parser)
    command: str = parsed.command
    options: Namespace = parsed[command]
    data_class = _instance(parser, "--data", options.data, pl.LightningDataModule)
    module_class = _instance(parser, "--module", options.module, pl.LightningModule)
    loss = None if options.loss is None else _instance(parser, "--loss", options.loss, object)
    paths = [options.checkpoint] if command == "report" else [options.first, options.second]
    paths = [Path(str(path)) for path in paths]
    try:
        subjects = _subjects(options, paths, module_class, data_class, loss)
    except Refused as error:
        parser.error(str(error))
    findings = [subject.findings for subject in subjects]
    output = Path(options.output)
    source = (
        f"Measured on {datetime.now():%Y-%m-%d} with lightning_entropy {__version__} and torch {torch.__version__} on "
        f"{_device(options)}: module {options.module}, data {options.data}, split {options.split}, seed {options.seed}."
    )

    def write() -> None:
        part = output.with_name(f"{output.name}.part")
        part.write_text(page(findings, source=source), encoding="utf-8")
        part.replace(output)

    look(subjects, examples=options.examples, budget=options.budget, skip=options.skip, grown=write)
    write()
    for found in findings:
        for section, rows in found.rows().items():
            for row in rows:
                print(f"{found.title}  {section:15} {row.name:32} {row}")
    for section, seen in findings[0].left.items():
        print(f"{section}: {unfinished(seen)}")
    if len(findings) == 2:
        print(verdict(*findings))
    print(f"wrote {output}")
    return output


def _subjects(options: Namespace, paths: list[Path], module_class: Any, data_class: Any, loss: Any) -> list[Subject]:
    """Make the data and every checkpoint's module, as the configurations and the command line say.

    Raises:
        Refused: a file that nobody has named would import something.
    """
    given = None if options.config is None else Path(str(options.config))
    trusted = given is not None
    datamodule = _configured(data_class, "data", _config(paths[0], given), options.data_settings or {}, trusted=trusted)
    datamodule.prepare_data()
    datamodule.setup("fit")
    module_settings = options.module_settings or {}
    subjects: list[Subject] = []
    for path, title in zip(paths, _titles(paths), strict=True):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = _config(path, given)
        saved = checkpoint.get("hyper_parameters", {})
        if "_instantiator" in saved and not trusted:  # a LightningCLI's: it would import what the file names
            values = {name: value for name, value in saved.items() if not name.startswith("_")}
            module = module_class(**{**_plain(values, "the checkpoint's hyper-parameters"), **module_settings})
            module.load_state_dict(checkpoint["state_dict"])
        elif config is None or (saved and not trusted):
            module = module_class.load_from_checkpoint(path, map_location=_device(options), **module_settings)
        else:
            module = _configured(module_class, "model", config, module_settings, trusted=trusted)
            module.load_state_dict(checkpoint["state_dict"])
        subjects.append(
            Subject(
                module.to(_device(options)),
                datamodule,
                title=title,
                split=options.split,
                loss=loss,
                batch_dim=options.batch_dim,
                mode=options.mode,
                seed=options.seed,
                checkpoint=checkpoint,
                settings={name: dict(options[name].as_dict()) for name in ESTIMATORS},
            )
        )
    return subjects


def _device(options: Namespace) -> str:
    return str(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def parse(arguments: Sequence[str] | None = None, parser: ArgumentParser | None = None) -> Namespace:
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
    if words and words[0] in ("report", "compare") and not {"--help", "-h"} & set(words):
        for name, example in (("module", "package.Class"), ("data", "package.DataModule")):
            if not any(re.match(rf"--{name}(=|$)", word) for word in words):
                parser.exit(
                    2,
                    f"error: {words[0]} needs --{name} {example}, the class that the checkpoint was trained with: a "
                    "checkpoint holds weights and no code\n",
                )
    return parser.parse_args(words)


def _parser() -> ArgumentParser:
    report, compare = Parser(), Parser()
    report.add_argument("checkpoint", type=Path_fr, help="the checkpoint file")
    compare.add_argument("first", type=Path_fr, help="a checkpoint file")
    compare.add_argument("second", type=Path_fr, help="another checkpoint file, of the same module and data")
    for command in (report, compare):
        command.add_argument("--module", type=str, required=True, help="import path of the LightningModule")
        command.add_argument("--data", type=str, required=True, help="import path of the LightningDataModule")
        for name in ("module", "data"):
            command.add_argument(
                f"--{name}_settings",
                type=dict[str, Any] | None,
                help=f"arguments of the {name}'s class, each as --{name}.NAME=VALUE",
            )
        command.add_argument("--config", type=Path_fr, help="a LightningCLI's config.yaml, whose classes are imported")
        command.add_argument(
            "--loss", type=str | None, help="import path of a callable (module, batch) -> scalar; null: cross entropy"
        )
        command.add_argument("--split", choices=("train", "val"), default="train", help="the loader to measure on")
        command.add_argument("--examples", type=int, default=512, help="examples to measure on, if time allows")
        command.add_argument(
            "--budget",
            type=float | None,
            default=60.0,
            help="seconds; few examples first, more while time is left; null: all of --examples at once, however long",
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
        command.add_argument("--output", type=str, default="diagnostics.html", help="the page to write")
        for name, estimator in ESTIMATORS.items():
            command.add_function_arguments(estimator, name, skip=set(_COMMON))
        command.set_defaults({f"local_entropy.{name}": value for name, value in VALLEY.items()})
    parser = Parser(prog=COMMAND, description=_DESCRIPTION)
    commands = parser.add_subcommands(dest="command", required=True)
    commands.add_subcommand("report", report, help="one checkpoint")
    commands.add_subcommand("compare", compare, help="two checkpoints side by side")
    return parser


def _instance(parser: ArgumentParser, option: str, path: str, kind: type) -> Any:
    """Import ``package.module.name`` and check what it is."""
    where, _, name = path.rpartition(".")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(where), name)
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"{option} must be an import path such as package.module.Class, got {path!r}: {error}")
    finally:
        sys.path.remove("")
    if kind is not object and not (isinstance(found, type) and issubclass(found, kind)):
        parser.error(f"{option} must be a {kind.__name__}, got {path}")
    return found


def _config(checkpoint: Path, given: Path | None) -> dict[str, Any] | None:
    """Read the configuration that goes with a checkpoint."""
    folders = checkpoint.resolve().parents[:2]
    path = given or next((f / "config.yaml" for f in folders if (f / "config.yaml").is_file()), None)
    return None if path is None else yaml.safe_load(path.read_text())


def _configured(
    cls: Any, section: str, config: dict[str, Any] | None, settings: dict[str, Any], *, trusted: bool = False
) -> Any:
    """Return an object of a class, from its section of a LightningCLI's configuration and more settings.

    Args:
        cls: the class.
        section: of the configuration.
        config: the configuration.
        settings: in the place of its values.
        trusted: it was named on the command line, and may name classes for arguments.

    Raises:
        Refused: the section of another one does, which would run code that nobody asked for.
    """
    values = dict((config or {}).get(section) or {})
    if "class_path" in values:
        values = dict(values.get("init_args") or {})
    values |= settings
    if not trusted:
        return cls(**_plain(values, f"the configuration's section {section!r}"))
    sys.path.insert(0, "")
    try:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "it", fail_untyped=False)
        # The first name is that of newer versions, which deprecate the second.
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        return instantiate(parser.parse_object({"it": values}))["it"]
    finally:
        sys.path.remove("")


class Refused(ValueError):
    """What is asked for would import what nobody has named; the message says what to do."""


def _plain(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values if none of them names a class.

    Raises:
        Refused: one does. A file that lies beside a checkpoint, or in it, imports nothing.
    """
    for name, value in values.items():
        if _names_a_class(value):
            raise Refused(
                f"{where} must hold plain values, got a class_path in {name!r}: a file that lies beside a checkpoint "
                "imports nothing. If you trust it, name it: --config FILE"
            )
    return values


def _names_a_class(value: Any) -> bool:
    if isinstance(value, dict):
        return "class_path" in value or any(_names_a_class(v) for v in value.values())
    return isinstance(value, list | tuple) and any(_names_a_class(v) for v in value)


def _titles(paths: list[Path]) -> list[str]:
    """Name checkpoints by their file, and by as many of their folders as tell them apart.

    Example:
        >>> _titles([Path("runs/sgd/1/last.ckpt"), Path("runs/sgd/2/last.ckpt")])
        ['1/last.ckpt', '2/last.ckpt']
    """
    names: list[str] = []
    longest = max(len(path.parts) for path in paths)
    for count in range(1, longest + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names
