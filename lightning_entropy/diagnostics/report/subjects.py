"""The data and the modules of a report, from what the command line and the configurations say."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from torch.utils.data import DataLoader

from lightning_entropy.diagnostics.report.checkpoint import fill, other_weights, read
from lightning_entropy.diagnostics.report.data import Data, is_loader
from lightning_entropy.diagnostics.report.findings import ESTIMATORS, Subject
from lightning_entropy.diagnostics.report.given_loss import check_loss, loss_of
from lightning_entropy.diagnostics.report.names import Refused, find, importing, said

_RETURNS = "a DataLoader, a pair (training loader, validation loader) or a LightningDataModule"


def device_of(options: Namespace) -> str:
    """Return where to measure.

    Raises:
        Refused: There is no such device here.
    """
    device = str(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refused(f"--device must be one that is here, got {device}: {said(error)}; leave it out") from None
    return device


def subjects_of(options: Namespace, paths: list[Path]) -> list[Subject]:
    """Make the data and every checkpoint's module, as the configurations and the command line say.

    Raises:
        Refused: Something is not there or of another kind, or a file that nobody has named would import something.
    """
    make = find("--module", options.module)
    if not callable(make) or (isinstance(make, type) and not issubclass(make, pl.LightningModule)):
        raise Refused(f"--module must be a LightningModule, got {options.module}, {_kind(make)}")
    loss = loss_of(options.loss)
    device = device_of(options)
    given = None if options.config is None else Path(str(options.config))
    if options.data is None and not (isinstance(make, type) and _has_loaders(make)):
        raise Refused(
            f"there must be data, got no --data and no train_dataloader in {options.module}: --data "
            "package.DataModule, or train.py:function that returns a DataLoader"
        )
    data = None
    if options.data is not None:
        data = data_of(find("--data", options.data), options, _config(paths[0], given), trusted=given is not None)
    subjects: list[Subject] = []
    for path, title in zip(paths, titles(paths), strict=True):
        checkpoint = read(path)
        module = _module(make, path, checkpoint, options, _config(path, given), trusted=given is not None)
        if data is None:
            _set_up("--module", options.module, module)
            data = Data.of(module, batch_dim=options.batch_dim, seed=options.seed)
        subjects.append(
            Subject(
                module.to(device),
                data,
                title=title,
                split=options.split,
                loss=loss,
                mode=options.mode,
                seed=options.seed,
                checkpoint=checkpoint,
                settings={name: dict(options[name].as_dict()) for name in ESTIMATORS},
            )
        )
        _check(subjects[-1], options)
    return subjects


def _check(subject: Subject, options: Namespace) -> None:
    """Read a batch and evaluate its loss, so that what is wrong with either is said before anything is measured."""
    _try("--data", options.data or options.module, "reading a batch", lambda: subject.try_loss(lambda *_: None))
    check_loss(subject, options.loss)


def data_of(made: Any, options: Namespace, config: dict[str, Any] | None = None, *, trusted: bool = False) -> Data:
    """Make the data from a LightningDataModule, its class, a loader, or a function that returns one of these.

    Raises:
        Refused: It is none of them.
    """
    settings = options.data_settings or {}
    name = options.data
    if isinstance(made, type) and issubclass(made, pl.LightningDataModule):
        cls: Any = made
        made = _try("--data", name, "making it", lambda: _configured(cls, "data", config, settings, trusted=trusted))
    elif isinstance(made, type):
        raise Refused(f"--data must be a LightningDataModule or a function, got {name}, {_kind(made)}")
    elif not _is_data(made):
        if not callable(made):
            raise Refused(f"--data must be callable or {_RETURNS}, got {name}, {_kind(made)}")
        function: Any = made
        made = _try("--data", name, "calling it", lambda: function(**settings))
        if isinstance(made, type) and issubclass(made, pl.LightningDataModule):
            made = _try("--data", name, "making what it returned", made)
        if not _is_data(made):
            raise Refused(f"--data must be a function that returns {_RETURNS}, got {_returned(made)} from {name}")
    if isinstance(made, pl.LightningDataModule):
        module: Any = made
        _set_up("--data", name, module)
        data = _try("--data", name, "asking it for loaders", lambda: Data.of(module, **_how(options)))
    else:
        loaders: Any = made
        train, val = loaders if _is_pair(loaders) else (loaders, None)
        data = Data(train, val, **_how(options))
    if options.split not in data.splits:
        raise Refused(f"--split must name a loader of the data, got {options.split!r}: {name} has {list(data.splits)}")
    return data


def _how(options: Namespace) -> dict[str, Any]:
    return {"batch_dim": options.batch_dim, "seed": options.seed}


def _is_pair(value: Any) -> bool:
    if not (isinstance(value, tuple | list) and len(value) == 2):
        return False
    loaders = [isinstance(part, DataLoader) or (part is None and i) for i, part in enumerate(value)]
    return all(loaders) or (isinstance(value, tuple) and all(is_loader(part) for part in value))


def _is_data(value: Any) -> bool:
    return isinstance(value, pl.LightningDataModule) or _is_pair(value) or is_loader(value)


def _has_loaders(cls: type) -> bool:
    return getattr(cls, "train_dataloader", None) is not pl.LightningModule.train_dataloader


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _try(option: str, name: str, what: str, make: Callable[[], Any]) -> Any:
    """Call code of the user's, whose failure ends in a line."""
    try:
        with importing(""):
            return make()
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{option} {name}: {what} has failed with {said(error)}{_hint(option, error)}") from error


def _hint(option: str, error: Exception) -> str:
    """Return what to give, where arguments are missing."""
    words = str(error)
    if not (isinstance(error, TypeError) and "argument" in words) or "unexpected" in words:
        return ""
    missing = re.findall(r"'(\w+)'", words.split("missing", 1)[1]) if "missing" in words else []
    return f": give arguments as {' '.join(f'{option}.{name}=VALUE' for name in missing or ['NAME'])}"


def _returned(value: Any) -> str:
    return "nothing (is there a return?)" if value is None else _kind(value)


def _set_up(option: str, name: str, owner: Any) -> None:
    def set_up() -> None:
        owner.prepare_data()
        owner.setup("fit")

    _try(option, name, "setting the data up", set_up)


def _module(
    make: Any,
    path: Path,
    checkpoint: dict[str, Any],
    options: Namespace,
    config: dict[str, Any] | None,
    *,
    trusted: bool,
) -> pl.LightningModule:
    settings = options.module_settings or {}
    saved = checkpoint.get("hyper_parameters", {})

    def filled(module: Any) -> Any:
        if not isinstance(module, pl.LightningModule):
            raise Refused(f"--module must be a LightningModule, got {_returned(module)} from {options.module}")
        fill(module, checkpoint["state_dict"], path, options.module)
        return module

    def build() -> Any:
        if not isinstance(make, type):
            return filled(make(**settings))
        cls: Any = make
        if "_instantiator" in saved and not trusted:  # a LightningCLI's: it would import what the file names
            values = {name: value for name, value in saved.items() if not name.startswith("_")}
            return filled(make(**{**_plain(values, "the checkpoint's hyper-parameters"), **settings}))
        if config is None or (saved and not trusted):
            try:
                return cls.load_from_checkpoint(path, map_location=device_of(options), **settings)
            except RuntimeError as error:
                raise other_weights(error, path, options.module) from None
        return filled(_configured(make, "model", config, settings, trusted=trusted))

    return _try("--module", options.module, f"making it from {path}", build)


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
    with importing(""):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "it", fail_untyped=False)
        # The first name is that of newer versions, which deprecate the second.
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        return instantiate(parser.parse_object({"it": values}))["it"]


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


def titles(paths: list[Path]) -> list[str]:
    """Name checkpoints by their file, and by as many of their folders as tell them apart.

    Example:
        >>> titles([Path("runs/sgd/1/last.ckpt"), Path("runs/sgd/2/last.ckpt")])
        ['1/last.ckpt', '2/last.ckpt']
    """
    names: list[str] = []
    longest = max(len(path.parts) for path in paths)
    for count in range(1, longest + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names
