"""What is asked for and cannot be ends the recipes' command lines in a line or two, as they are run by hand."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import messages
from tests import forked

ROOT = Path(__file__).parents[2]
ALLCNN = ["fit", "--config", "recipes/configs/nets/allcnn.yaml", "--config", "recipes/configs/methods/sgd.yaml"]

MISTAKES = [
    ("allcnn", ["fit", "--config", "recipes/configs/nets/alcnn.yaml"], "alcnn.yaml'. Did you mean allcnn.yaml?"),
    ("allcnn", [*ALLCNN, "--data.rot", "x"], "nrecognized arguments: --data.rot x. Did you mean --data.root?"),
    ("allcnn", ["fti"], "invalid choice: 'fti' (choose from"),
    ("lm", ["fit", "--data.fles", "x"], "nrecognized arguments: --data.fles x. Did you mean --data.files?"),
    ("compare", ["alcnn"], "argument net: invalid choice: 'alcnn'"),
    ("compare", ["lenet", "--methods", "sdg"], "method must be one of sgd, stopped, .*, got sdg"),
    ("compare", ["lenet", "--methods", "sgd", "sgd"], "methods must be different ones"),
    ("compare", ["lenet", "--epohcs", "3"], "nrecognized arguments: --epohcs 3. Did you mean --epochs?"),
    ("compare", ["lenet", "--epochs", "x"], "argument --epochs: must be an integer in"),
    ("compare", ["lenet", "--source", "folder", "--root", "/nowhere"], "root must hold train/ and test/"),
    ("compare", ["lm", "--setps", "3"], "nrecognized arguments: --setps 3. Did you mean --steps?"),
    ("quickstart", ["--epohcs", "1"], "nrecognized arguments: --epohcs 1. Did you mean --epochs?"),
    ("hessian", ["--imags", "1"], "nrecognized arguments: --imags 1. Did you mean --images?"),
    ("smoothing", ["--oot", "x.png"], "nrecognized arguments: --oot x.png. Did you mean --out?"),
]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")
@pytest.mark.parametrize(("module", "arguments", "words"), MISTAKES)
def test_a_mistake_ends_in_two_lines(
    module: str,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"recipes.{module}", run_name="__main__", alter_sys=False)
    out, err = capsys.readouterr()
    said = (out + err).strip().splitlines() or [str(ended.value.code)]
    assert len(said) <= 2
    assert said[0].startswith("error: ")
    for part in words.split(".*"):
        assert part in said[0]


@pytest.mark.processes
def test_a_training_without_data_ends_in_a_sentence() -> None:
    where = ["--data.source", "folder", "--data.root", "/nowhere", "--trainer.accelerator", "cpu"]
    done = forked.run("recipes.allcnn", *ALLCNN, *where, "--trainer.logger", "false")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: root must hold train/ and test/")


@pytest.mark.processes
def test_recipes_without_their_libraries_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\nfound = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'sklearn' else found(name, *rest)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "recipes.quickstart"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert 'the recipes need sklearn: pip install -e ".[recipes]" in a checkout' in done.stderr


def test_an_error_that_is_not_the_users_keeps_its_traceback() -> None:
    def broken() -> None:
        raise ValueError("of ours")

    with pytest.raises(ValueError, match="of ours"):
        messages.run(broken)
