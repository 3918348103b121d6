"""Every config of the language model takes a step, and the command line has its defaults and its budget."""

import shlex
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from recipes.cli import RecipeCLI
from recipes.lm.cli import main
from tests.recipes.test_configs import COMMANDS, FOLDER, configs_of, leaves, load, names

pytestmark = pytest.mark.filterwarnings("ignore")

NETS, METHODS = names("lm/nets"), names("lm/methods")
STEPS = [pair for pair in product(NETS, METHODS) if pair[0] == NETS[0] or pair[1] == "lm/methods/adamw.yaml"]
SHRINK = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.random.default_rng(0).integers(190, size=20_000, dtype=np.uint8).tofile("text")
    monkeypatch.setattr(RecipeCLI, "subcommands", staticmethod(lambda: {"fit": LightningCLI.subcommands()["fit"]}))
    return str(tmp_path / "text")


def small(file, *configs):
    """Arguments that make a training of these configs a small one on the CPU."""
    arguments = [argument for config in configs for argument in ("--config", str(FOLDER / config))]
    for key, value in SHRINK.items():
        arguments += [f"--model.net.init_args.{key}", str(value)]
    arguments += ["--data.files", f"[{file}]", "--data.block_size", "16", "--data.batch_size", "8"]
    arguments += ["--model.compile", "false", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    settings = dict(pair for config in configs for pair in leaves(load(config)))
    if ("trainer", "devices") in settings:
        arguments += ["--trainer.devices", "2"]
        strategy = settings.get(("trainer", "strategy"))
        own = ["--trainer.strategy.start_method", "fork"]
        arguments += ["--trainer.strategy", f"{strategy}_fork"] if strategy else own
    return arguments


def test_there_is_a_config_for_every_method_and_net():
    methods = ["adamw", "muon", "ema", "lookahead", "snoo", "entropy_sgd"]
    methods += ["ddp", "local_sgd", "diloco", "streaming_diloco", "elastic_sgd", "elastic_entropy"]
    assert sorted(f"lm/methods/{method}.yaml" for method in methods) == METHODS
    assert [f"lm/nets/gpt_{size}.yaml" for size in ("10m", "124m", "1m")] == NETS
    here = {path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("lm/**/*.yaml")}
    assert here == {name for pair in STEPS for name in pair}


def test_only_muon_changes_a_setting_of_a_net():
    for net, method in product(NETS, METHODS):
        ours, theirs = ({path for path, _ in leaves(load(name))} for name in (net, method))
        shared = [a for a in ours for b in theirs if a[: len(b)] == b or b[: len(a)] == a]
        assert bool(shared) == method.endswith("muon.yaml"), (net, method)


def test_nets_and_texts_have_one_block_size():
    for name in NETS:
        config = load(name)
        assert config["model"]["net"]["init_args"]["block_size"] == config["data"]["block_size"]


@pytest.mark.parametrize("configs", STEPS, ids="+".join)
def test_every_config_of_the_language_model_takes_a_step(configs, files):
    if "muon" in configs[1] and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    cli = main(["fit", *small(files, *configs), "--trainer.fast_dev_run", "true"])
    assert cli.trainer.state.finished


def test_without_a_config_it_is_the_net_of_a_million_weights(files):
    arguments = small(files)
    arguments += ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--data.val_windows", "16"]
    cli = main(["fit", *arguments, "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"])
    assert cli.config.fit.model.optimizer.class_path == "torch.optim.AdamW"
    folder = Path("runs/gpt_1m/version_0")
    assert sorted(path.name.partition("-step")[0] for path in (folder / "checkpoints").iterdir()) == [
        "best",
        "last.ckpt",
    ]
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["block_size"] == 16
    again = ["--ckpt_path", str(folder / "checkpoints/last.ckpt"), "--trainer.max_steps", "6"]
    assert main(["fit", *arguments, *again]).trainer.global_step == 6


def test_the_command_as_it_stands_trains_the_default_net_on_the_default_text(files):
    """But for its number of steps: no shrunk net, no files, the compiler and the precision of the config."""
    few = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"]
    cli = main(["fit", *few])
    assert cli.trainer.global_step == 2
    assert sum(p.numel() for p in cli.model.parameters()) > 900_000
    assert 0 < cli.trainer.callback_metrics["val_loss"] < 6


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ([], 10_000),  # 1,280,000 tokens by 8 windows of 16
        (["--passes_per_epoch", "4"], 2500),
        (["--trainer.accumulate_grad_batches", "3"], 3334),
        (["--trainer.max_steps", "7"], 7),
        (["--trainer.max_epochs", "2"], -1),
        (["--tokens", "null", "--trainer.max_epochs", "2"], -1),
    ],
)
def test_a_budget_in_tokens_is_shared_by_replicas(more, steps, files, monkeypatch):
    class Resolved(Exception):
        pass

    def stop(cli):
        raise Resolved(cli.config.fit.trainer.max_steps)

    monkeypatch.setattr(RecipeCLI, "instantiate_classes", stop)
    with pytest.raises(Resolved) as caught:
        main(["fit", *small(files, NETS[0]), "--tokens", "1280000", *more])
    assert caught.value.args[0] == steps


COMMANDS_OF_LM = [line for line in COMMANDS if "python -m recipes.lm" in line]


@pytest.mark.parametrize("command", COMMANDS_OF_LM)
def test_the_readmes_language_models_take_a_step(command, files):
    arguments = shlex.split(command)
    assert arguments[:4] == ["python", "-m", "recipes.lm", "fit"]
    configs = configs_of(arguments)
    # Last, so that made-up data and a small net have the last word.
    rest = [FOLDER.parents[1] / value if value.startswith("recipes/") else value for value in arguments[4:]]
    rest = [*map(str, rest), *small(files, *configs), "--trainer.fast_dev_run", "true"]
    if "muon" in command and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    assert main(["fit", *rest]).trainer.state.finished


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_a_step_costs(name):
    config = load(name)
    assert config.get("passes_per_epoch", 1) == config.get("trainer", {}).get("devices", 1)
