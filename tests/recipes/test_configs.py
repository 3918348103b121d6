"""Every shipped config parses and takes a step on made-up data; the command line's subcommands work."""

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from recipes.cli import main
from recipes.compare.__main__ import _parse
from recipes.compare.methods import Method

pytestmark = pytest.mark.filterwarnings("ignore")

FOLDER = Path(__file__).parents[2] / "recipes" / "configs"
CONFIGS = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
# Nets shrunk to what a test can pay for; the config's other arguments stay.
SHRINK = {
    "recipes.allcnn.AllCNN": {"width": 2},
    "recipes.wide_resnet.WideResNet": {"depth": 10, "width": 1},
    "recipes.lenet.LeNet": {},
}


def on_made_up_data(name):
    config = yaml.safe_load((FOLDER / name).read_text())
    net = config["model"]["net"]
    arguments = ["--config", str(FOLDER / name), "--trainer.accelerator", "cpu"]
    for key, value in SHRINK[net["class_path"]].items():
        arguments += [f"--model.net.init_args.{key}", str(value)]
    source = "random_grey" if net["class_path"].endswith("LeNet") else "random"
    classes = str(config["model"].get("num_classes", 10))
    arguments += ["--data.source", source, "--data.batch_size", "16", "--data.normalise", "mean_std"]
    # The made-up data has ten classes.
    if classes != "10":
        arguments += ["--model.num_classes", "10", "--model.net.init_args.num_classes", "10"]
    if "devices" in config["trainer"]:
        arguments += ["--trainer.devices", "2"]
        strategy = config["trainer"]["strategy"]
        if isinstance(strategy, str):
            arguments += ["--trainer.strategy", f"{strategy}_fork"]
        else:
            arguments += ["--trainer.strategy.start_method", "fork"]
    return arguments


def test_there_is_a_config_for_every_method_and_net():
    methods = ["sgd", "entropy_sgd", "hamilton_jacobi", "heat", "lookahead", "ema", "swa", "sam"]
    methods += ["elastic_sgd", "elastic_entropy"]
    wanted = {f"allcnn/{method}.yaml" for method in methods}
    for net in ("wrn_28_10", "wrn_16_4"):
        for data in ("cifar10", "cifar100"):
            wanted |= {f"{net}/{data}/{m}.yaml" for m in ("sgd", "entropy_sgd", "elastic_sgd", "elastic_entropy")}
    assert wanted <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_takes_a_step(name, tmp_path, monkeypatch):
    config = yaml.safe_load((FOLDER / name).read_text())
    monkeypatch.chdir(tmp_path)
    cli = main("recipes.allcnn.AllCNN", ["fit", *on_made_up_data(name), "--trainer.fast_dev_run", "true"])
    assert cli.trainer.state.finished
    assert config["trainer"]["logger"]["init_args"]["name"] == name.removesuffix(".yaml")


def test_numbers_are_numbers_to_every_yaml_reader():
    def leaves(node):
        if isinstance(node, dict):
            for value in node.values():
                yield from leaves(value)
        elif isinstance(node, list):
            for value in node:
                yield from leaves(value)
        else:
            yield node

    for name in CONFIGS:
        for value in leaves(yaml.safe_load((FOLDER / name).read_text())):
            if isinstance(value, str):
                with pytest.raises(ValueError, match="could not convert"):
                    float(value)


def test_fit_then_resume_validate_test_and_predict_from_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = on_made_up_data("lenet/entropy_sgd.yaml")
    quiet = ["--trainer.enable_model_summary", "false"]
    fit = main("recipes.lenet.LeNet", ["fit", *arguments, *quiet, "--trainer.max_epochs", "2"])
    folder = Path(fit.trainer.checkpoint_callback.dirpath)
    assert folder == Path("runs/lenet/entropy_sgd/version_0/checkpoints")
    files = sorted(path.name for path in folder.iterdir())
    assert [name.partition("-epoch")[0] for name in files] == ["best", "last.ckpt"]
    assert (folder.parent / "config.yaml").exists()
    assert list(folder.parent.glob("events.out.tfevents*"))
    last = ["--ckpt_path", str(folder / "last.ckpt")]
    again = main("recipes.lenet.LeNet", ["fit", *arguments, *quiet, "--trainer.max_epochs", "3", *last])
    assert again.trainer.global_step == 3 * 32
    assert torch.isfinite(again.trainer.callback_metrics["val_loss"])
    for command in ("validate", "test"):
        cli = main("recipes.lenet.LeNet", [command, *arguments, *quiet, *last])
        assert cli.trainer.callback_metrics[f"{command.replace('idate', '')}_accuracy"] > 0.5
    said = main("recipes.lenet.LeNet", ["predict", *arguments, *quiet, *last])
    rows = list(csv.DictReader((Path(said.trainer.log_dir) / "predictions.csv").open()))
    data = said.datamodule
    assert [int(row["image"]) for row in rows] == list(range(len(data.test_indices)))
    images, _ = data.materialise(next(iter(data.predict_dataloader())))
    with torch.no_grad():
        shares = said.model.eval()(images).softmax(1)
    for row, share in zip(rows, shares, strict=False):
        assert [float(row[name]) for name in data.classes] == pytest.approx(share.tolist(), abs=1e-4)
        assert row["predicted"] == data.classes[share.argmax()]


def test_last_is_the_last_epoch_and_best_the_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, epochs in (("lenet/sgd.yaml", 4), ("lenet/swa.yaml", 8)):
        arguments = [*on_made_up_data(name), "--trainer.enable_model_summary", "false"]
        arguments += ["--model.optimizer.init_args.lr", "0.001"]
        early = ["--checkpoint.mode", "min"]  # the accuracy grows, and the best epoch is an early one
        cli = main("recipes.lenet.LeNet", ["fit", *arguments, *early, "--trainer.max_epochs", str(epochs)])
        folder = Path(cli.trainer.checkpoint_callback.dirpath)
        best, last = sorted(folder.iterdir())
        assert best.name.startswith("best-epoch=")
        assert last.name == "last.ckpt"
        assert int(best.name.split("=")[1].split("-")[0]) < epochs - 1
        saved = torch.load(last, weights_only=False)
        assert saved["global_step"] == cli.trainer.global_step
        # SWA's average too, which is put in place for an epoch without gradients that BatchNorm needs.
        assert all(torch.equal(value, saved["state_dict"][key]) for key, value in cli.model.state_dict().items()
                   if "running" not in key and "tracked" not in key)  # fmt: skip


@pytest.mark.parametrize("without", [["--trainer.enable_progress_bar", "false"], ["--trainer.logger", "false"]])
def test_without_progress_bar_or_logger(without, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*on_made_up_data("lenet/entropy_sgd.yaml"), "--trainer.enable_model_summary", "false", *without]
    assert main("recipes.lenet.LeNet", ["fit", *arguments, "--trainer.max_epochs", "1"]).trainer.state.finished


def test_a_net_for_other_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*on_made_up_data("lenet/sgd.yaml"), "--data.source", "random", "--trainer.fast_dev_run", "true"]
    with pytest.raises(ValueError, match="net must take images of the data's 3 channels, got one for 1"):
        main("recipes.lenet.LeNet", ["fit", *arguments])


README = (FOLDER.parent / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("command", [line for line in COMMANDS if " fit " in line and "--ckpt_path" not in line])
def test_the_readmes_trainings_take_a_step(command, tmp_path, monkeypatch):
    python, _, module, *arguments = shlex.split(command)
    assert python == "python"
    config = Path(arguments[arguments.index("--config") + 1])
    name = config.relative_to("recipes/configs").as_posix()
    arguments[arguments.index("--config") + 1] = str(FOLDER / name)
    # Last, so that made-up data and a small net have the last word.
    arguments += [*on_made_up_data(name)[2:], "--trainer.fast_dev_run", "true", "--model.compile", "false"]
    monkeypatch.chdir(tmp_path)
    net = {"allcnn": "AllCNN", "wide_resnet": "WideResNet", "lenet": "LeNet"}[module.removeprefix("recipes.")]
    assert main(f"{module}.{net}", arguments).trainer.state.finished


@pytest.mark.parametrize("command", [line for line in COMMANDS if "recipes.compare" in line])
def test_the_readmes_comparisons_are_understood(command):
    options = _parse(shlex.split(command)[3:])
    assert [Method.parse(label) for label in options.methods]


def test_the_readmes_other_commands_name_what_exists():
    rest = [line for line in COMMANDS if "recipes.compare" not in line and "--ckpt_path" in line]
    assert len(rest) == 4
    for command in rest:
        arguments = shlex.split(command)
        assert (FOLDER.parents[1] / arguments[arguments.index("--config") + 1]).exists()
        # Where test_fit_then_resume finds it.
        assert arguments[-1] == "runs/lenet/sgd/version_0/checkpoints/last.ckpt"
