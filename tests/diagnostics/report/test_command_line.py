import re
import runpy
import sys

import lightning.pytorch as pl
import pytest
import torch

from lightning_entropy.diagnostics import Trajectory
from lightning_entropy.diagnostics.report import command_line as command
from lightning_entropy.diagnostics.report import findings
from lightning_entropy.diagnostics.report import subjects as sources
from lightning_entropy.diagnostics.report.command_line import main
from tests.diagnostics import tiny

pytestmark = tiny.LIGHTNING_ADVICE
CLASSES = ["--module", "tests.diagnostics.tiny.TinyModule", "--data", "tests.diagnostics.tiny.TinyData"]
QUICK = [
    *("--examples=24", "--data.examples=32"),
    *(f"--local_entropy.{name}" for name in ("samples=2", "warmup=1", "chains=2", "leaps=1", "draws=4")),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    paths = []
    for epochs in (1, 12):
        folder = tmp_path_factory.mktemp("run")
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[Trajectory(at_end=False)] if epochs > 1 else [],
        )
        trainer.fit(tiny.TinyModule(width=5), datamodule=tiny.TinyData())
        trainer.save_checkpoint(folder / f"after-{epochs}.ckpt")
        paths.append(str(folder / f"after-{epochs}.ckpt"))
    return paths


def test_report_is_one_page_with_every_section(checkpoints, tmp_path, capsys):
    output = main(["report", checkpoints[1], *CLASSES, *QUICK, "--output", str(tmp_path / "page.html")])
    text = output.read_text()
    assert text.count("<svg") == 7  # Loss, Hessian, local entropy, noise, and the recorded path.
    assert "largest eigenvalue" in text
    assert "rank(D), clipped" in text
    assert "p-value of the current" in text
    assert not re.search(r'(src|href)="(?!#|data:)', text)  # Self-contained.
    assert "largest eigenvalue" in capsys.readouterr().out


def test_compare_says_which_is_flatter(checkpoints, tmp_path, capsys):
    output = main(
        ["compare", *checkpoints, *CLASSES, *QUICK, "--skip", "gradient_noise", "--output", str(tmp_path / "p.html")]
    )
    text = output.read_text()
    assert text.count("<svg") == 9  # Two for each section, and the three panels of the one recorded path.
    assert "flatter" in text
    assert "after-1.ckpt" in text
    assert "numbers" in capsys.readouterr().out


def test_a_checkpoint_is_as_flat_as_itself(checkpoints, tmp_path):
    both = ["compare", checkpoints[0], checkpoints[0], *CLASSES, *QUICK, "--skip", "gradient_noise"]
    assert "Neither is flatter" in main([*both, "--output", str(tmp_path / "p.html")]).read_text()


def test_a_terminal_is_told_what_comes_next_and_how_long_it_takes(checkpoints, tmp_path, monkeypatch, capsys):
    words = ["report", checkpoints[0], *CLASSES, *QUICK, "--skip", "gradient_noise", "local_entropy"]
    main([*words, "--output", str(tmp_path / "page.html")])
    assert "examples" not in capsys.readouterr().err
    monkeypatch.setattr(command.sys.stderr, "isatty", lambda: True)
    main([*words, "--output", str(tmp_path / "page.html")])
    told = [line for line in capsys.readouterr().err.splitlines() if "examples" in line]
    assert [re.sub(r"\d+ s", "N s", line) for line in told] == [
        "loss, 24 examples: N s, N s used",
        "hessian, 24 examples: N s, N s used",
    ]


def test_ctrl_c_keeps_what_was_found(checkpoints, tmp_path, monkeypatch, capsys):
    take, ends = findings.Subject.measure, {"local_entropy"}

    def measure(self, section, *given):
        if section in ends:
            raise KeyboardInterrupt
        return take(self, section, *given)

    monkeypatch.setattr(findings.Subject, "measure", measure)
    arguments = [
        "report",
        checkpoints[0],
        *CLASSES,
        "--examples=24",
        "--data.examples=32",
        "--skip",
        "loss",
        "gradient_noise",
    ]
    text = main([*arguments, "--output", str(tmp_path / "page.html")]).read_text()
    assert "largest eigenvalue" in text
    assert "Not measured, since the look was ended" in text
    assert "local_entropy: not measured" in capsys.readouterr().out
    ends.add("hessian")
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--output", str(tmp_path / "none.html")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "none.ckpt", *CLASSES], "the checkpoint must be a file, got none.ckpt: there is none"),
        (["report", __file__], "report needs --module package.Class or --module train.py:Class, the class"),
        (["compare", __file__, __file__, *CLASSES[:2]], "there must be data, got no --data and no train_dataloader"),
        (["report", __file__, "--module", "nowhere.Class", *CLASSES[2:]], "--module must be an import path"),
        (["report", __file__, "--module", "torch.nn.Linear", *CLASSES[2:]], "--module must be a LightningModule"),
        (["report", __file__, *CLASSES, "--datum.x=1"], "report has no option --datum.x: did you mean --data?"),
        (["report", __file__, "--modul", "train.py:Net"], "report has no option --modul: did you mean --module?"),
        (["report", __file__, *CLASSES, "--budget=ten"], "error: --budget must be a number or null, got 'ten'"),
        (["report", __file__, *CLASSES, "--examples=1.5"], "error: --examples must be an integer, got '1.5'"),
        (["report", __file__, *CLASSES, "--hessian.top=x"], "error: --hessian.top must be an integer, got 'x'"),
        (["report", __file__, *CLASSES, "--split=test"], "invalid choice: 'test' (choose from"),
        (
            ["repart", __file__, *CLASSES],
            "word must be report or compare, got 'repart': did you mean report?",
        ),
        ([], "the first word must be report or compare, got nothing"),
        (["report", *CLASSES], "report takes 1 checkpoint after its name, got 0"),
        (["compare", __file__, *CLASSES], "compare takes 2 checkpoints after its name, got 1"),
        (["report", __file__, *CLASSES, "--budget=-1"], "--budget must be > 0 seconds or null, got -1"),
        (["report", __file__, *CLASSES, "--examples=0"], "--examples must be at least 1, got 0"),
        (["report", __file__, *CLASSES, "--hessian.top=many"], "hessian.top"),
        (["report", __file__, *CLASSES[:2]], "data"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert message in said
    assert end.value.code == 2 and len(said.strip().splitlines()) == 2, said


@pytest.mark.parametrize("name", ["report", "compare"])
def test_every_option_says_what_it_is(name):
    commands = next(a for a in command._parser()._actions if a.dest == "command")
    for action in commands.choices[name]._actions:
        assert action.help, action.dest


def test_settings_of_a_class_and_of_an_estimator_are_told_from_its_name(checkpoints):
    words = ["report", checkpoints[0], *CLASSES, "--module.width=5", "--module.lr", "1e-3", "--hessian.top=2"]
    options = command.parse(words).report
    assert options.module == CLASSES[1]
    assert options.module_settings == {"width": 5, "lr": 1e-3}
    assert options.data_settings is None
    assert options.hessian.top == 2
    assert options.local_entropy.samples == 20


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")
def test_it_is_a_command(monkeypatch, capsys):
    """What ``python -m`` does, without the seconds of a new process."""
    monkeypatch.setattr(sys, "argv", ["diagnostics", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("lightning_entropy.diagnostics", run_name="__main__")
    assert "compare" in capsys.readouterr().out


@pytest.mark.parametrize("section", ["data", "model"])
def test_a_configuration_beside_a_checkpoint_imports_nothing(tmp_path, section, monkeypatch):
    """Of somebody's folder, only what the command line names is imported."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for values in (
        {"class_path": "evil_module.Evil"},
        [{"class_path": "evil_module.Evil"}],
        {"a": {"class_path": "x"}},
    ):
        with pytest.raises(ValueError, match=f"section '{section}' must hold plain values, got a class_path in 'net'"):
            sources._configured(dict, section, {section: {"class_path": "any.Name", "init_args": {"net": values}}}, {})
    found = sources._configured(
        dict, section, {section: {"class_path": "evil_module.Evil", "init_args": {"n": 3}}}, {"m": 4}
    )
    assert found == {"n": 3, "m": 4}
    assert "evil_module" not in sys.modules


def test_a_configuration_that_is_named_may_name_classes(checkpoints, tmp_path):
    """As LightningCLI writes it, for a module whose arguments are objects."""
    config = tmp_path / "config.yaml"
    config.write_text("model:\n  width: 5\ndata:\n  examples: 32\n")
    values = {"model": {"class_path": "any.Name", "init_args": {"net": {"class_path": "torch.nn.ReLU"}}}}
    assert isinstance(sources._configured(Holder, "model", values, {}, trusted=True).net, torch.nn.ReLU)
    text = main(["report", checkpoints[0], *CLASSES, "--config", str(config), "--examples=24", "--output",
                 str(tmp_path / "p.html"), "--skip", "gradient_noise", "local_entropy"]).read_text()  # fmt: skip
    assert "largest eigenvalue" in text


class Holder:
    def __init__(self, net: torch.nn.Module) -> None:
        self.net = net


def test_a_configuration_that_may_not_is_refused_in_a_line(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "_config", lambda *_: {"data": {"x": {"class_path": "a.B"}}})
    with pytest.raises(SystemExit):
        main(["report", checkpoints[0], *CLASSES])
    assert "If you trust it, name it: --config FILE" in capsys.readouterr().err
