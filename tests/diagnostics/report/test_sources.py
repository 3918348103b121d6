"""Modules and data from anywhere, and what is said where that cannot be."""

import json
import re

import lightning.pytorch as pl
import pytest
import torch

from lightning_entropy.diagnostics.report.command_line import main
from lightning_entropy.diagnostics.report.data import Data
from lightning_entropy.diagnostics.report.names import Refused, find
from lightning_entropy.diagnostics.report.page import page
from tests.diagnostics import tiny

pytestmark = tiny.LIGHTNING_ADVICE
MODULE, DATA = "tests.diagnostics.tiny:TinyModule", "tests.diagnostics.tiny:TinyData"
DOTTED = MODULE.replace(":", ".")
LOOK = ["--examples=24", "--skip", "hessian", "local_entropy", "gradient_noise", "trajectory"]

SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
from tests.diagnostics.tiny import TinyData, TinyModule
import {helper}

class Net(TinyModule):
    pass

class Own(TinyModule):
    def train_dataloader(self):
        return train()

def make():
    return TinyModule(width=5)

def train(examples=48):
    data = TinyData(examples)
    data.setup("fit")
    return data.train_dataloader()

def both():
    data = TinyData()
    data.setup("fit")
    return data.train_dataloader(), data.val_dataloader()

def datamodule():
    return TinyData()

def datamodule_class():
    return TinyData

def needs(root):
    return train()

def number():
    return 3

def generator():
    return iter(train())

def breaks():
    raise FileNotFoundError("no folder\\n  data")

def smoothed(module, batch):
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1], label_smoothing=0.1)

class Pixels(torch.nn.Module):
    pass

class Dicts(TinyModule):
    def training_step(self, batch, index):
        loss = torch.nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])
        self.log("loss", loss)
        return dict(loss=loss, more=3)

class Bodiless(TinyModule):
    forward = pl.LightningModule.forward

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

class Manual(TinyModule):
    def training_step(self, batch, index):
        return None

class Wide(TinyModule):
    def __init__(self, breadth, depth=1):
        super().__init__(breadth)

class Deeper(TinyModule):
    def __init__(self, width=5):
        super().__init__(width)
        self.more = torch.nn.Linear(2, 2)
        self.even = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))

def dicts():
    return torch.utils.data.DataLoader([dict(x=x, y=y) for x, y in train().dataset], 8)

def nothing():
    train()

def no_module():
    pass

def empty():
    return torch.utils.data.DataLoader([])

class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, index):
        raise KeyError("picture 3")

def unreadable():
    return torch.utils.data.DataLoader(Broken())

def regression(module, batch):
    return (module(batch[0]) - 1).square()

loader = train()
instance = TinyData()
three = 3

if __name__ == "__main__":
    raise SystemExit("the script was run")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A script with a module beside it, and a checkpoint of its net."""
    path = tmp_path_factory.mktemp("scripts")
    (path / "beside_it.py").write_text("")
    (path / "train_tiny.py").write_text(SCRIPT.format(helper="beside_it"))
    (path / "broken_tiny.py").write_text("import sys\nsys.exit('usage: broken')\n")
    (path / "json_of_mine.py").write_text("Net = 3\n")
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=path)  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(tiny.TinyModule(width=5), datamodule=tiny.TinyData())
    trainer.save_checkpoint(path / "last.ckpt")
    torch.save({"weights": 3}, path / "other.pt")
    (path / "text.ckpt").write_text("no checkpoint")
    return path


def report(folder, module="@Net", data="@both", *more, checkpoint="last.ckpt"):
    words = ["report", str(folder / checkpoint), "--module", module, *LOOK, "--output", str(folder / "page.html")]
    words += [] if data is None else ["--data", data]
    words += ["--json", str(folder / "page.json"), *more]
    script = str(folder / "train_tiny.py")
    return main([w.replace("@", f"{script}:").replace("train_tiny.py", script, "@" not in w) for w in words])


def losses(folder):
    found = json.loads((folder / "page.json").read_text())["checkpoints"][0]["sections"]["loss"]["numbers"]
    return {name: (number["value"], number["error"]) for name, number in found.items()}


@pytest.mark.parametrize(
    ("data", "splits"),
    [
        ("@both", 2),
        ("@train", 1),
        ("@loader", 1),
        ("@datamodule", 2),
        ("@datamodule_class", 2),
        ("@instance", 2),
        ("@TinyData", 2),
        (DATA, 2),
    ],
)
def test_data_of_every_kind_is_the_same_data(folder, data, splits):
    report(folder, data=data)
    numbers = losses(folder)
    assert len(numbers) == 2 * splits
    if "both" not in data:
        report(folder)
        assert {name: losses(folder)[name] for name in numbers} == numbers


@pytest.mark.parametrize(
    "module",
    [
        "@Net",
        "@make",
        MODULE,
        DOTTED,
    ],
)
def test_a_module_by_any_of_its_names(folder, module):
    assert "training loss" in report(folder, module).read_text()


def test_a_module_has_its_own_loaders_and_a_loss_its_own_script(folder):
    assert "train_tiny.py:Own" in report(folder, "@Own", None).read_text()
    before = losses(folder)["training loss"]
    report(folder, "@Own", None, "--loss", "@smoothed")
    assert losses(folder)["training loss"] != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.py:Net",), r"--module must name a script that there is, got .*: no file 'nowhere.py' in"),
        (("train_tiny.py",), r"--module must be an import path such as package.module.Class or .*train_tiny.py:Class"),
        (("@Nett",), r"has no 'Nett'; it has Net"),
        (("@three",), r"--module must be a LightningModule, got .*train_tiny.py:three, a int"),
        (("@TinyData",), r"--module must be a LightningModule, got .*, the class TinyData"),
        (("@number",), r"--module must be a LightningModule, got a int from .*:number"),
        (("BROKEN:Net",), r"--module .*broken_tiny.py:Net: importing .* has failed with SystemExit: usage: broken"),
        (("no.such.module.Net",), r"--module must be an import path such as .*, got 'no.such.module.Net'"),
        (("@Net", "@number"), r"--data must be a function that returns a DataLoader, a pair .*, got a int"),
        (("@Net", "@generator"), r"--data must be a function that returns a DataLoader, .*, got a _SingleProcess"),
        (("@Net", "@three"), r"--data must be callable or a DataLoader, .*, got .*:three, a int"),
        (("@Net", "@Net"), r"--data must be a LightningDataModule or a function, .*, the class Net"),
        (("@Net", "@breaks"), r"calling it has failed with FileNotFoundError: no folder data"),
        (("@Net", "@needs"), r"missing 1 required .*'root': give arguments as --data.root=VALUE"),
        (("@Net", "@train", "--data.size=3"), r"unexpected keyword argument 'size'$"),
        (("@Net", "@train", "--split=val"), r"--split must name a loader of the data, got 'val'"),
        (("@Net", None), r"there must be data, got no --data and no train_dataloader in"),
        (("@Net", "@both", "--loss", "@three"), r"--loss must be a callable"),
        (("@Net", "@both", "--module.width=7"), r"its net.0.weight has the shape \[5, 5\], the module's \[7, 5\]"),
        (("@Bodiless",), r"--loss .* for Bodiless on a batch that is a list of torch.float32 \(4, 5\), torch.int64 "
         r"\(4,\): it has no forward; give --loss training_step for the module's own, or --loss train.py:"),
        (("@Dicts", "@dicts"), r"--loss .* for Dicts on a batch that is a dict of x, y: .* give --loss training_step"),
        (("@Net", "@dicts", "--loss", "@smoothed"), r"smoothed has failed for Net on a batch that is a dict of x"),
        (("@Net", "@both", "--loss", "@regression"), r"must return a scalar tensor, .*, got torch.float32 \(4, 3\)"),
        (("@Net", "@both", "--loss", "@Pixels"), r"--loss must be a callable .*, the class Pixels"),
        (("@Manual", "@both", "--loss=training_step"), r"as with manual optimization; give --loss train.py:function"),
        (("@Net", "@nothing"), r"--data must be a function that returns .*, got nothing \(is there a return\?\) from"),
        (("@no_module",), r"--module must be a LightningModule, got nothing \(is there a return\?\) from .*no_module"),
        (("@Net", "@empty"), r"--data .*:empty: .* data must hold at least one example"),
        (("@Net", "@unreadable"), r"--data .*:unreadable: reading a batch has failed with KeyError: 'picture 3'"),
        (("@Wide",), r"missing 1 required .*'breadth': give arguments as --module.breadth=VALUE"),
        (("@Deeper",), r"last.ckpt must be a checkpoint of .*Deeper, made with .* it lacks more.weight, more.bias, "
         r"even.0.weight and 5 more\. Name its class"),
        (("@Net", "@both", "--device=cuda:7"), r"--device must be one that is here, got cuda:7: .*; leave it out"),
        (("@Net", "@both", "--device=gpu"), r"--device must be one that is here, got gpu"),
        (("train",), r"--module must be an import path such as package.module.Class or train.py:Class, got 'train'"),
        (("@Net", "@both", "--json=no/such/folder/x.json"), r"--json must be in a folder that there is"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_two_lines(folder, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        report(folder, *(w and w.replace("BROKEN", str(folder / "broken_tiny.py")) for w in words))
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(said) == 2, said
    assert said[0].startswith("error: ") and re.search(message, said[0])
    assert "report --help lists the options" in said[1]


@pytest.mark.parametrize(("module", "data"), [("@Bodiless", "@both"), ("@Dicts", "@dicts"), ("@Net", "@both")])
def test_the_module_s_own_loss_needs_no_forward_and_no_pairs(folder, module, data, recwarn):
    report(folder, module, data, "--loss=training_step", "--batch_dim=0")
    value = losses(folder)["training loss"][0]
    report(folder)
    assert value == pytest.approx(losses(folder)["training loss"][0], rel=1e-6), "which is the cross entropy here"
    assert not [w for w in recwarn if "self.log" in str(w.message)]


@pytest.mark.parametrize(("name", "reason"), [("other.pt", "got a file without 'state_dict'"), ("text.ckpt", "got ")])
def test_a_file_that_is_no_checkpoint(folder, name, reason, capsys):
    with pytest.raises(SystemExit):
        report(folder, checkpoint=name)
    assert re.search(
        f"{name} must be a checkpoint that the Trainer has saved, {reason}|{reason}", capsys.readouterr().err
    )


def test_a_script_of_the_name_of_a_module_is_refused(folder):
    script = folder / "json.py"
    script.write_text("Net = 3\n")
    with pytest.raises(Refused, match=r"must name a script whose name is its own, .* there is a module 'json' already"):
        find("--module", f"{script}:Net")
    assert json.dumps(3) == "3"


def test_a_section_that_cannot_be_measured_says_why_and_the_others_are(folder, capsys):
    words = ["report", str(folder / "last.ckpt"), "--module", MODULE, "--data",
             DATA, "--examples=24", "--skip", "gradient_noise", "hessian",
             "--local_entropy.rungs=3", "--local_entropy.temperature=1e-9",
             "--output", str(folder / "p.html")]  # fmt: skip
    text = main(words).read_text()
    assert "Not measured: ValueError: rungs must be enough" in text
    assert "training loss" in text
    assert "local_entropy: Not measured: ValueError" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words[:8], "loss", *words[8:]])
    assert "error: nothing could be measured: ValueError: rungs must be enough" in capsys.readouterr().err


def test_all_numbers_are_in_the_json_with_their_errors_and_source(folder):
    report(folder)
    found = json.loads((folder / "page.json").read_text())
    assert found["format"] == 1
    assert {"Measured", "Versions", "Device", "Checkpoint last.ckpt", "Module", "Data", "Settings"} <= set(
        found["source"]
    )
    assert "seed=0" in found["source"]["Settings"] and torch.__version__ in found["source"]["Versions"]
    number = found["checkpoints"][0]["sections"]["loss"]["numbers"]["training loss"]
    assert number["error"] > 2 * number["stderr"] > 0
    text = (folder / "page.html").read_text()
    for name in found["source"]:
        assert f"<dt>{name}</dt>" in text


def test_the_differences_are_in_the_json_and_an_image_has_both(folder):
    words = ["compare", str(folder / "last.ckpt"), str(folder / "last.ckpt"), "--module", MODULE,
             "--data", DATA, *LOOK, "--output", str(folder / "p.html"),
             "--json", str(folder / "p.json"), "--image", str(folder / "p.png")]  # fmt: skip
    main(words)
    found = json.loads((folder / "p.json").read_text())["differences"]
    assert [d["value"] for d in found] == [0, 0, 0, 0]
    assert {d["smaller"] for d in found} == {None}
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")


def test_three_checkpoints_are_too_many():
    with pytest.raises(ValueError, match="findings must be one or two, got 0"):
        page([])


def test_a_split_of_no_loaders_is_none():
    assert list(Data([torch.ones(2, 1)], []).splits) == ["train"]
    with pytest.raises(ValueError, match="data must have a training or a validation loader, got neither"):
        Data(None, [])
