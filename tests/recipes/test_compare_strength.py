"""The strength study compares by pairs of seeds, says where it finds nothing, and resumes."""

import dataclasses
import json
import math

import pytest
import torch

from recipes.compare import study as study_module
from recipes.compare.__main__ import main as compare
from recipes.compare.methods import Method
from recipes.compare.strength.report import Difference, Results, paired, picture, table, values
from recipes.compare.strength.tasks import BASELINE, METHODS, TRIALS
from recipes.compare.study import Setting, Study
from recipes.data import ImageData

pytestmark = pytest.mark.filterwarnings("ignore")


def fake(run, folder):
    """A training that takes no time: heat's error is 1 below SGD's in the mean, EMA's is the same, each with noise."""
    noise = (0.1, -0.1, 0.0)[run.seed]
    error = 20 + run.seed + 10 * abs(run.lr - 0.1) + 100 * abs(run.weight_decay - 8e-3)
    error += {"sgd": 0.0, "ema": 3 * noise, "heat": noise - 1.0}[run.method]
    keys = ("val_error", "test_error", "test_loss", "calibration_error", "corrupted_error", "pruned_error")
    record = {
        "run": dataclasses.asdict(run),
        "curve": [],
        "final": dict.fromkeys([*keys, "train_error"], error),
        **dict.fromkeys(["steps", "replicas", "parameters", "gradient_evaluations"], 1),
        **dict.fromkeys(["seconds", "images_per_second", "peak_memory_mib"], 1.0),
        "versions": {"torch": "0"},
    }
    path = folder / f"{run.name}.json"
    path.write_text(json.dumps(record))
    return path


def test_a_study_of_two_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_module, "execute", fake)
    monkeypatch.setattr(ImageData, "prepare_data", lambda self: None)
    monkeypatch.setattr(ImageData, "setup", lambda self: None)
    arguments = ["--tasks", "lenet", "resnet", "--methods", "ema", "heat", "--seeds", "3", "--workers", "0"]
    results = compare(["strength", *arguments, "--folder", "images", "--out", str(tmp_path)])
    assert [method for method, _ in results["lenet"].study.arms()] == ["sgd", "ema", "heat"]
    assert results["resnet"].study.task.data["root"] == "images"
    assert set(results["lenet"].study.chosen(results["lenet"].search).values()) == {Setting(0.1, 8e-3)}
    text = (tmp_path / "table.md").read_text()
    # The pairs differ by -0.9, -1.1 and -1: Student's 4.3027 times 0.1 / 3^(1/2). The seeds themselves differ by more.
    assert "| heat | 0.1* | 0.008 | 20.00 +- 0.95 (-1.00 +- 0.25)" in text
    assert "| ema | 0.1* | 0.008 | 21.00 +- 0.89 (=)" in text
    assert "| sgd | 0.1* | 0.008 | 21.00 +- 1.00 |" in text
    assert text.count("### ") == 2
    assert text.count(" | 1000.0 +- 0.0 (=) |") == 4, "a second for one gradient, of two methods on two tasks"
    assert picture(results).axes[0].yaxis_inverted(), "the first method on top, however many the tasks"
    assert (tmp_path / "strength.png").stat().st_size > 5000
    assert len((tmp_path / "lenet" / "results.csv").read_text().splitlines()) == 1 + 3 * (9 + 3)
    capsys.readouterr()
    compare(["strength", *arguments, "--folder", "images", "--out", str(tmp_path)])
    assert "27 trainings, of which 27 are kept from before" in capsys.readouterr().out


def test_one_seed_finds_nothing_and_a_training_that_diverged_is_said(tmp_path):
    assert paired([1.0], [2.0])[0] == -1.0
    assert not paired([1.0], [2.0]).found
    assert Difference(-0.2, 0.1).found
    study = Study(TRIALS["lenet"].task, [BASELINE, "ema"], [0.1], 2, tmp_path)
    final = [
        {
            "run": dataclasses.asdict(run),
            "versions": {},
            "seconds": 1.0,
            "gradient_evaluations": 1,
            "final": dict.fromkeys(KEYS, math.nan if run.seed else 5.0),
        }
        for run in study.final_runs([])
    ]
    assert len(values(final, "ema", "test_loss")) == 2
    assert "| ema | 0.1 | - | diverged |" in table({"lenet": Results(study, [], final)})


KEYS = ("test_error", "test_loss", "calibration_error", "corrupted_error", "pruned_error", "train_error")


def test_every_task_makes_its_net_and_every_method_its_parts():
    for label in METHODS:
        assert Method.parse(label).parts(lr=0.1, steps=100)
    assert all(trial.words for trial in TRIALS.values())


def test_some_training_labels_are_another_classes_the_same_for_every_seed():
    def labels(seed, share):
        data = ImageData("random_grey", n_train=100, n_val=50, wrong_labels=share, seed=seed)
        data.setup()
        return data._data.labels

    clean, wrong, again = labels(0, 0.0), labels(0, 0.4), labels(1, 0.4)
    assert torch.equal(wrong, again)
    assert (clean != wrong)[:100].sum() == 40
    assert torch.equal(clean[100:], wrong[100:])
