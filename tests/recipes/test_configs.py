"""Nets and methods combine, and every config takes a step on made-up data; the command line's subcommands work."""

import csv
import re
import shlex
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from recipes.cli import RecipeCLI, main
from recipes.compare.__main__ import _parse
from recipes.compare.lm.command import parse as parse_lm
from recipes.compare.methods import Method
from recipes.compare.strength.command import parse as parse_strength

pytestmark = pytest.mark.filterwarnings("ignore")

FOLDER = Path(__file__).parents[2] / "recipes" / "configs"
# Those of the language model are in test_lm_configs.py.
CONFIGS = sorted(
    name for path in FOLDER.rglob("*.yaml") if not (name := path.relative_to(FOLDER).as_posix()).startswith("lm/")
)
# Nets shrunk to what a test can pay for; the configs' other arguments stay.
SHRINK = {
    "recipes.allcnn.AllCNN": {"width": 2},
    "recipes.wide_resnet.WideResNet": {"depth": 10, "width": 1},
    "recipes.resnet.ResNet18": {"width": 2},
    "recipes.lenet.LeNet": {},
}


def names(folder):
    return sorted(path.relative_to(FOLDER).as_posix() for path in (FOLDER / folder).glob("*.yaml"))


# What may be combined: the nets and methods of a folder, a method below a net's name with that net alone.
PAIRS = list(product(names("nets"), names("methods")))
PAIRS += list(product(names("papers/parle/nets"), names("papers/parle/methods")))
for own in ("allcnn", "lenet"):
    PAIRS += list(product([f"papers/entropy_sgd/nets/{own}.yaml"], names(f"papers/entropy_sgd/methods/{own}")))
# A net and a method have no setting in common, as a test below says: then one pair for each net and for each method
# shows what all of them would.
STEPS = [pair for pair in PAIRS if not pair[0].startswith("nets/")]
STEPS += [pair for pair in PAIRS if pair[0] == "nets/lenet.yaml" or pair[1] == "methods/sgd.yaml"]
STEPS = [pair for pair in STEPS if pair[0] != "papers/parle/nets/wrn_28_10.yaml" or pair[1].endswith("/sgd.yaml")]
STEPS = list(dict.fromkeys(STEPS))
STEPS += [("nets/wrn_16_4.yaml", data, "methods/sgd.yaml") for data in names("data")]


def load(name):
    return yaml.safe_load((FOLDER / name).read_text())


def leaves(node, path=()):
    """Every value with the keys on the way to it; a list is one value."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, node


def arguments_for(*files):
    return [argument for file in files for argument in ("--config", str(FOLDER / file))]


def on_made_up_data(*files):
    """Arguments that make a training of these configs a small one on the CPU."""
    settings = dict(pair for file in files for pair in leaves(load(file)))
    net = settings["model", "net", "class_path"]
    arguments = ["--trainer.accelerator", "cpu"]
    for key, value in SHRINK[net].items():
        arguments += [f"--model.net.init_args.{key}", str(value)]
    source = "random_grey" if net.endswith("LeNet") else "random"
    arguments += ["--data.source", source, "--data.batch_size", "16", "--data.normalise", "mean_std"]
    # The made-up data has ten classes.
    if settings.get(("model", "num_classes"), 10) != 10:
        arguments += ["--model.num_classes", "10", "--model.net.init_args.num_classes", "10"]
    if ("trainer", "devices") in settings:
        arguments += ["--trainer.devices", "2"]
        strategy = settings.get(("trainer", "strategy"))
        arguments += (
            ["--trainer.strategy", f"{strategy}_fork"] if strategy else ["--trainer.strategy.start_method", "fork"]
        )
    return arguments


@pytest.fixture
def fit_alone(monkeypatch):
    """A command line that knows ``fit`` alone; to make the other subcommands' parsers takes longer than the step."""
    monkeypatch.setattr(RecipeCLI, "subcommands", staticmethod(lambda: {"fit": LightningCLI.subcommands()["fit"]}))


@pytest.fixture
def resolved(fit_alone, monkeypatch):
    """The settings that a command line comes to, without the training."""

    class Resolved(Exception):
        pass

    def stop(cli):
        raise Resolved(cli.config.fit)

    monkeypatch.setattr(RecipeCLI, "instantiate_classes", stop)

    def resolve(*files, more=()):
        with pytest.raises(Resolved) as caught:
            main(["fit", *arguments_for(*files), *more])
        return caught.value.args[0]

    return resolve


def test_there_is_a_config_for_every_method_and_net():
    methods = ["sgd", "entropy_sgd", "hamilton_jacobi", "heat", "lookahead", "ema", "swa", "sam"]
    methods += ["elastic_sgd", "elastic_entropy"]
    assert names("methods") == sorted(f"methods/{method}.yaml" for method in methods)
    assert names("nets") == [f"nets/{net}.yaml" for net in ("allcnn", "lenet", "resnet18", "wrn_16_4", "wrn_28_10")]
    assert {name for pair in PAIRS for name in pair} | set(names("data")) == set(CONFIGS)
    assert {name for files in STEPS for name in files} == set(CONFIGS)


def test_a_method_leaves_every_setting_of_a_net_as_it_is():
    for net, method in PAIRS:
        ours, theirs = ({path for path, _ in leaves(load(name))} for name in (net, method))
        assert not [(a, b) for a in ours for b in theirs if a[: len(b)] == b or b[: len(a)] == a], (net, method)


@pytest.mark.parametrize("files", STEPS, ids="+".join)
def test_every_config_takes_a_step(files, fit_alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments_for(*files), *on_made_up_data(*files), "--trainer.fast_dev_run", "true"]
    assert main(["fit", *arguments]).trainer.state.finished


def test_every_method_spends_the_nets_effective_epochs(resolved):
    cost = {"sam": 2, "elastic_sgd": 3, "elastic_entropy": 3}
    for method in names("methods"):
        passes = cost.get(Path(method).stem, 1)
        assert load(method).get("passes_per_epoch", 1) == passes
    for net, method, epochs in (
        ("lenet", "sgd", 30),
        ("lenet", "sam", 15),
        ("lenet", "elastic_sgd", 10),
        ("allcnn", "entropy_sgd", 200),
        ("allcnn", "elastic_entropy", 67),  # 66.7
    ):
        assert resolved(f"nets/{net}.yaml", f"methods/{method}.yaml").trainer.max_epochs == epochs


def test_what_is_given_overrides_the_computed_number_of_epochs(resolved):
    files = ("nets/lenet.yaml", "methods/sam.yaml")
    assert resolved(*files, more=["--trainer.max_epochs", "3"]).trainer.max_epochs == 3
    assert resolved(*files, more=["--trainer.max_steps", "7"]).trainer.max_epochs is None
    assert resolved(*files, more=["--effective_epochs", "5"]).trainer.max_epochs == 3
    assert resolved(*files, more=["--effective_epochs", "null"]).trainer.max_epochs is None


@pytest.mark.parametrize("value", ["0", "-1", "1e400", "nan", "9**9**9"])
def test_effective_epochs_are_a_positive_integer(value, fit_alone, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--effective_epochs", value])
    assert "effective_epochs" in capsys.readouterr().err


def test_a_run_is_named_after_its_configs(resolved, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("data: {batch_size: 64}")
    files = ("nets/wrn_28_10.yaml", "data/cifar100.yaml", "methods/heat.yaml")
    logger = resolved(*files, mine).trainer.logger
    assert (logger.init_args.save_dir, logger.init_args.name) == ("runs", "wrn_28_10/cifar100/heat/mine")
    papers = resolved("papers/parle/nets/allcnn.yaml", "papers/parle/methods/sgd.yaml").trainer.logger
    assert (papers.init_args.save_dir, papers.init_args.name) == ("runs/papers/parle", "allcnn/sgd")
    named = resolved(*files, more=["--trainer.logger.init_args.name", "trial"])
    assert named.trainer.logger.init_args.name == "trial"
    assert resolved(*files, more=["--trainer.logger", "false"]).trainer.logger is False


def test_numbers_are_numbers_to_every_yaml_reader():
    def texts(node):
        if isinstance(node, str):
            yield node
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from texts(child)

    for text in (text for name in CONFIGS for text in texts(load(name))):
        with pytest.raises(ValueError, match="could not convert"):
            float(text)


LENET = ("nets/lenet.yaml", "methods/sgd.yaml")
LENET_ENTROPY_SGD = ("nets/lenet.yaml", "methods/entropy_sgd.yaml")


def test_fit_then_resume_validate_test_and_predict_from_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments_for(*LENET_ENTROPY_SGD), *on_made_up_data(*LENET_ENTROPY_SGD)]
    quiet = ["--trainer.enable_model_summary", "false"]
    fit = main(["fit", *arguments, *quiet, "--trainer.max_epochs", "2"])
    folder = Path(fit.trainer.checkpoint_callback.dirpath)
    assert folder == Path("runs/lenet/entropy_sgd/version_0/checkpoints")
    files = sorted(path.name for path in folder.iterdir())
    assert [name.partition("-epoch")[0] for name in files] == ["best", "last.ckpt"]
    assert (folder.parent / "config.yaml").exists()
    assert list(folder.parent.glob("events.out.tfevents*"))
    last = ["--ckpt_path", str(folder / "last.ckpt")]
    again = main(["fit", *arguments, *quiet, "--trainer.max_epochs", "3", *last])
    assert again.trainer.global_step == 3 * 32
    assert torch.isfinite(again.trainer.callback_metrics["val_loss"])
    for command in ("validate", "test"):
        cli = main([command, *arguments, *quiet, *last])
        assert cli.trainer.callback_metrics[f"{command.replace('idate', '')}_accuracy"] > 0.5
    said = main(["predict", *arguments, *quiet, *last])
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
    for files, epochs in ((LENET, 4), (("nets/lenet.yaml", "methods/swa.yaml"), 8)):
        arguments = [*arguments_for(*files), *on_made_up_data(*files), "--trainer.enable_model_summary", "false"]
        arguments += ["--model.optimizer.init_args.lr", "0.001"]
        early = ["--checkpoint.mode", "min"]  # the accuracy grows, and the best epoch is an early one
        cli = main(["fit", *arguments, *early, "--trainer.max_epochs", str(epochs)])
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
    arguments = [*arguments_for(*LENET_ENTROPY_SGD), *on_made_up_data(*LENET_ENTROPY_SGD), *without]
    arguments += ["--trainer.enable_model_summary", "false"]
    assert main(["fit", *arguments, "--trainer.max_epochs", "1"]).trainer.state.finished


def test_a_net_for_other_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        *arguments_for(*LENET),
        *on_made_up_data(*LENET),
        "--data.source",
        "random",
        "--trainer.fast_dev_run",
        "true",
    ]
    with pytest.raises(ValueError, match="net must take images of the data's 3 channels, got one for 1"):
        main(["fit", *arguments, "--trainer.fast_dev_run", "true"])


README = (FOLDER.parent / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def configs_of(arguments):
    """The configs that a command names, each of which is there."""
    files = [value for option, value in pairwise(arguments) if option == "--config"]
    assert all((FOLDER.parents[1] / file).is_file() for file in files)
    return [Path(file).relative_to("recipes/configs").as_posix() for file in files]


FITS = [line for line in COMMANDS if " fit " in line and "--ckpt_path" not in line and "recipes.lm" not in line]


@pytest.mark.parametrize("command", FITS)
def test_the_readmes_trainings_take_a_step(command, fit_alone, tmp_path, monkeypatch):
    python, _, module, *arguments = shlex.split(command)
    assert python == "python"
    assert (FOLDER.parents[1] / f"{module.replace('.', '/')}.py").is_file()
    files = configs_of(arguments)
    # Last, so that made-up data and a small net have the last word.
    arguments += [*on_made_up_data(*files), "--trainer.fast_dev_run", "true", "--model.compile", "false"]
    (tmp_path / "recipes").symlink_to(FOLDER.parent)
    monkeypatch.chdir(tmp_path)
    assert main(arguments).trainer.state.finished


@pytest.mark.parametrize("command", [line for line in COMMANDS if "recipes.compare" in line])
def test_the_readmes_comparisons_are_understood(command):
    arguments = shlex.split(command)[3:]
    if arguments[0] in ("lm", "strength"):
        assert {"lm": parse_lm, "strength": parse_strength}[arguments[0]](arguments[1:]).methods
    else:
        assert [Method.parse(label) for label in _parse(arguments).methods]


def test_the_readmes_other_commands_name_what_exists():
    rest = [line for line in COMMANDS if "recipes.compare" not in line and "--ckpt_path" in line]
    assert len(rest) == 4
    for command in rest:
        arguments = shlex.split(command)
        assert configs_of(arguments) == list(LENET)
        # Where test_fit_then_resume finds it.
        assert arguments[-1] == "runs/lenet/sgd/version_0/checkpoints/last.ckpt"
