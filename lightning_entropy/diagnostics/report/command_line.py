"""Report on checkpoints from a command line: ``python -m lightning_entropy.diagnostics report CHECKPOINT ...``."""

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from lightning_entropy.diagnostics.report.findings import SECTIONS, Findings, measure
from lightning_entropy.diagnostics.report.page import page, verdict

_EPILOG = """
--data.NAME=VALUE and --module.NAME=VALUE are passed to the classes; VALUE is a Python literal or else a string. The
module's other hyper-parameters come from the checkpoint (save_hyperparameters), or else, like the data's, from the
config.yaml that LightningCLI left one or two folders above it, or from --config. Estimators take
--hessian.NAME=VALUE, --local_entropy.NAME=VALUE and --gradient_noise.NAME=VALUE in the same way.

  python -m lightning_entropy.diagnostics report best.ckpt --module recipes.classifier.Classifier \\
      --data recipes.data.ImageData --data.source=cifar10 --data.root=data
"""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the command line.

    Args:
        arguments: In place of the process's own.

    Returns:
        Where the page was written.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    extra = _settings(parser, rest)
    data_class = _instance(parser, "--data", options.data, pl.LightningDataModule)
    module_class = _instance(parser, "--module", options.module, pl.LightningModule)
    loss = None if options.loss is None else _instance(parser, "--loss", options.loss, object)
    paths = [options.checkpoint] if options.command == "report" else [options.first, options.second]
    for path in paths:
        if not path.is_file():
            parser.error(f"{path} must be a checkpoint file, and there is none")
    datamodule = _configured(data_class, "data", _config(paths[0], options.config), extra.pop("data"))
    datamodule.prepare_data()
    datamodule.setup("fit")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    module_settings = extra.pop("module")
    findings: list[Findings] = []
    for path, title in zip(paths, _titles(paths), strict=True):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = _config(path, options.config)
        saved = checkpoint.get("hyper_parameters", {})
        if "_instantiator" in saved:  # a LightningCLI's: it would import what the file names
            values = {name: value for name, value in saved.items() if not name.startswith("_")}
            module = module_class(**{**_plain(values, "the checkpoint's hyper-parameters"), **module_settings})
            module.load_state_dict(checkpoint["state_dict"])
        elif saved or config is None:
            module = module_class.load_from_checkpoint(path, map_location=device, **module_settings)
        else:
            module = _configured(module_class, "model", config, module_settings)
            module.load_state_dict(checkpoint["state_dict"])
        found = measure(
            module.to(device),
            datamodule,
            title=title,
            split=options.split,
            loss=loss,
            examples=options.examples,
            mode=options.mode,
            seed=options.seed,
            skip=options.skip,
            checkpoint=checkpoint,
            settings=extra,
        )
        findings.append(found)
        for section, rows in found.rows().items():
            for row in rows:
                print(f"{title}  {section:15} {row.name:32} {row}")
    if len(findings) == 2:
        print(verdict(*findings))
    options.output.write_text(page(findings), encoding="utf-8")
    print(f"wrote {options.output}")
    return options.output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_entropy.diagnostics",
        description="How flat is the minimum, how loud and how round is the noise, did SGD walk in circles.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="one checkpoint", allow_abbrev=False)
    report.add_argument("checkpoint", type=Path)
    compare = commands.add_parser("compare", help="two checkpoints side by side", allow_abbrev=False)
    compare.add_argument("first", type=Path)
    compare.add_argument("second", type=Path)
    for command in (report, compare):
        command.add_argument("--module", required=True, help="class path of the LightningModule")
        command.add_argument("--data", required=True, help="class path of the LightningDataModule")
        command.add_argument("--config", type=Path, help="a LightningCLI's config.yaml")
        command.add_argument("--loss", help="path of a callable (module, batch) -> scalar; default: cross entropy")
        command.add_argument("--split", choices=("train", "val"), default="train")
        command.add_argument("--examples", type=int, default=512, help="examples to measure on (default 512)")
        command.add_argument("--mode", choices=("eval", "train"), default="eval")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", help="default: cuda if there is one")
        command.add_argument("--skip", nargs="*", default=[], choices=list(SECTIONS), help="sections to leave out")
        command.add_argument("--output", type=Path, default=Path("diagnostics.html"))
    return parser


def _settings(parser: argparse.ArgumentParser, rest: list[str]) -> dict[str, dict[str, Any]]:
    """Read ``--group.name=value`` and ``--group.name value``."""
    found: dict[str, dict[str, Any]] = {group: {} for group in ("module", "data", *SECTIONS)}
    words = iter(rest)
    for word in words:
        key, equals, value = word.partition("=")
        group, dot, name = key.removeprefix("--").partition(".")
        if not (key.startswith("--") and dot and name.isidentifier() and group in found):
            parser.error(f"unrecognized argument {word}")
        value = value if equals else next(words, "")
        try:
            found[group][name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[group][name] = value
    return found


def _instance(parser: argparse.ArgumentParser, option: str, path: str, kind: type) -> Any:
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


def _configured(cls: Any, section: str, config: dict[str, Any] | None, settings: dict[str, Any]) -> Any:
    """Make an object of a class from its section of a LightningCLI's configuration and more settings.

    Raises:
        ValueError: the section names another class for an argument, which would run code that nobody asked for.
    """
    values = dict((config or {}).get(section) or {})
    if "class_path" in values:
        values = dict(values.get("init_args") or {})
    return cls(**_plain({**values, **settings}, f"the configuration's section {section!r}"))


def _plain(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values if none of them names a class.

    Raises:
        ValueError: one does. A file that lies beside a checkpoint, or in it, imports nothing.
    """
    for name, value in values.items():
        if _names_a_class(value):
            raise ValueError(
                f"{where} must hold plain values, got a class_path in {name!r}: classes are imported from the command "
                "line alone. Measure such a module from a script, with the functions of lightning_entropy.diagnostics"
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
