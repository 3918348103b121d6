"""The comparison is fair, resumable, and reports what was run."""

import csv
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest

from recipes.compare import report, trainings
from recipes.compare import run as run_module
from recipes.compare import study as study_module
from recipes.compare.__main__ import _parse
from recipes.compare.__main__ import main as compare
from recipes.compare.run import Run
from recipes.compare.study import Study
from recipes.data.cache import write
from tests.recipes.comparison import TASK, record_of

pytestmark = pytest.mark.filterwarnings("ignore")


def study(tmp_path, **changes):
    values = {"task": TASK, "methods": ["sgd", "sam"], "lrs": [0.01, 0.1], "seeds": 2, "out": tmp_path, "workers": 0}
    return Study(**values | changes)


def fake(run, folder):
    """A training that takes no time, best at 0.1 for sam and 0.01 for sgd."""
    best = 0.1 if run.method == "sam" else 0.01
    error = 10 + abs(run.lr - best) * 100 + run.seed
    point = {"evaluations": 18, "epochs": 3.0, "seconds": 1.0, "val_error": error, "val_error_running": error + 1}
    keys = ("val_error", "test_error", "test_error_running", "train_error", "loss_rise")
    final = dict.fromkeys(keys, error)
    record = {
        "run": dataclasses.asdict(run),
        "curve": [point | {"epochs": 1.0, "val_error": 50.0}, point],
        "final": final,
        "steps": 18,
        "replicas": 1,
        "parameters": 3,
        "gradient_evaluations": 18,
        "seconds": 1.0,
        "images_per_second": 576.0,
        "peak_memory_mib": 1.0,
        "versions": {"torch": "0", "device": "none"},
    }
    path = folder / f"{run.name}.json"
    path.write_text(json.dumps(record))
    return path


def test_every_method_searches_the_same_rates_and_keeps_its_own_best(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "execute", fake)
    comparison = study(tmp_path)
    search = comparison.train(comparison.search_runs())
    assert {(r["run"]["method"], r["run"]["lr"]) for r in search} == {
        (m, lr) for m in ("sgd", "sam") for lr in (0.01, 0.1)
    }
    assert comparison.chosen(search) == {("sgd", "compute"): (0.01, None), ("sam", "compute"): (0.1, None)}
    runs = comparison.final_runs(search)
    assert [(r.method, r.lr, r.seed) for r in runs] == [
        ("sgd", 0.01, 0),
        ("sgd", 0.01, 1),
        ("sam", 0.1, 0),
        ("sam", 0.1, 1),
    ]


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    done = []

    def killed_at_the_third(run, folder):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(run.name)
        return fake(run, folder)

    comparison = study(tmp_path)
    monkeypatch.setattr(study_module, "execute", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        comparison.train(comparison.search_runs())
    again = []
    monkeypatch.setattr(study_module, "execute", lambda run, folder: again.append(run.name) or fake(run, folder))
    search = comparison.train(comparison.search_runs())
    comparison.train(comparison.final_runs(search))
    assert not set(done) & set(again)
    assert len(again) == 2 + 2, "the search's trainings at the chosen rate are seed 0 of the comparison"


def test_a_training_that_is_killed_leaves_no_result(tmp_path, monkeypatch):
    def killed(path, save):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, save)

    monkeypatch.setattr(run_module, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        record_of("sgd", tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_another_task_is_another_run():
    run = Run(TASK, "sgd", 0.1, 0)
    changes = [{"lr": 0.2}, {"seed": 1}, {"budget": "steps"}, {"task": dataclasses.replace(TASK, epochs=4)}]
    names = {run.name} | {dataclasses.replace(run, **change).name for change in changes}
    assert len(names) == 5
    assert Run.from_dict(json.loads(json.dumps(dataclasses.asdict(run)))) == run


def test_only_replicated_methods_have_a_second_table(tmp_path):
    comparison = study(tmp_path, methods=["sgd", "elastic_sgd"], budgets=["compute", "steps"])
    assert comparison.arms() == [("sgd", "compute"), ("elastic_sgd", "compute"), ("elastic_sgd", "steps")]


def test_the_command_line_writes_results_tables_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_module, "execute", fake)
    arguments = ["lenet", "--source", "random_grey", "--methods", "sgd", "sam", "--seeds", "2", "--lrs", "0.01", "0.1"]
    arguments += ["--n_val", "64"]
    compare([*arguments, "--workers", "0", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["role"] for row in rows] == ["search"] * 4 + ["final"] * 4
    table = (tmp_path / "table.md").read_text()
    assert "| sgd | 0.01* | 10.50 +- 0.71 | 10.50 +- 0.71 |" in table
    assert "| sam | 19.00 | 10.00 |" in table
    said = capsys.readouterr().out
    assert table in said and "```json" not in said
    assert "4 trainings, of which 0 are kept from before" in said
    assert json.loads((tmp_path / "task.json").read_text())["task"]["net"] == "lenet"
    for picture in ("curves.png", "errors.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"


def test_in_the_picture_the_best_method_is_on_top_and_one_that_diverged_has_no_dot():
    def record(method, error):
        return {"run": {"method": method, "budget": "compute"}, "final": {"test_error": error}}

    final = [record("sgd", 12.0), record("sgd", 14.0), record("sam", 10.0), record("sam", 11.0)]
    axis = report.errors([*final, record("heat", float("nan")), record("heat", 9.0)]).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["heat", "sgd", "sam"]
    dots = [tuple(line.get_xydata()[0]) for line in axis.lines if line.get_marker() == "o"]
    assert dots == [(13.0, 1.0), (10.5, 2.0)]
    assert [text.get_text() for text in axis.texts] == ["diverged"]


def test_a_failed_training_is_named_after_the_others_are_done(tmp_path):
    task = dataclasses.replace(TASK, data={"source": "folder", "root": str(tmp_path / "nowhere")})
    comparison = study(tmp_path, task=task, methods=["sgd"], lrs=[0.1], seeds=1, workers=1)
    with pytest.raises(
        RuntimeError, match=r"must finish, got 1 that did not:\n.*sgd-compute-lr0\.1.*\.log: .*root must hold"
    ):
        comparison.train(comparison.final_runs([]))
    log = next((tmp_path / "runs").glob("*.log")).read_text()
    assert "root must hold train/ and test/" in log


def test_data_that_cannot_be_read_ends_it_before_any_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="root must hold train/ and test/"):
        compare(["lenet", "--source", "folder", "--root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ["sgd", "sgd"]}, "methods must be different ones"),
        ({"lrs": [0.1, 0.1]}, "lrs must be different ones"),
        ({"methods": ["sgd"], "budgets": ["steps"]}, "budgets must hold compute where no method has replicas"),
    ],
)
def test_a_study_of_nothing_or_of_the_same_twice_is_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        study(tmp_path, **values)


def test_replicas_that_diverge_are_a_result_that_no_rate_is_chosen_by(tmp_path):
    comparison = study(tmp_path, methods=["elastic_sgd:replicas=2,inner_steps=2"], lrs=[0.05, 1e20], seeds=1, workers=0)
    search = comparison.train(comparison.search_runs())
    assert all(math.isnan(value) for value in search[1]["final"].values())
    assert math.isfinite(search[0]["final"]["test_error"])
    assert list(comparison.chosen(search).values()) == [(0.05, None)]
    final = comparison.train(comparison.final_runs(search))
    assert "| elastic_sgd:replicas=2,inner_steps=2 | 0.05* |" in report.table(comparison, search, final)
    assert "| diverged |" in report.table(comparison, search, final)
    report.report(comparison, search, [*final, search[1]])


def test_a_net_alone_that_diverges_is_the_same_result(tmp_path):
    record = record_of("sgd", tmp_path, lr=1e20)
    assert all(math.isnan(value) for value in record["final"].values())
    assert math.isnan(record["curve"][-1]["val_error"])


def test_every_training_has_as_many_cores(monkeypatch):
    for cores, workers, shares in ((3, 2, [[0], [1]]), (8, 3, [[0, 1], [2, 3], [4, 5]]), (2, 3, [[0], [1]])):
        monkeypatch.setattr(trainings.os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        assert trainings._shares(workers) == shares


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end a child with its parent")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_trainings_end_with_the_comparison(sent, tmp_path):
    """Or it would be given again and train the same beside them."""
    arguments = ["lenet", "--source", "random_grey", "--n_val", "64", "--epochs", "100000", "--lrs", "0.1"]
    command = [sys.executable, "-m", "recipes.compare", *arguments, "--methods", "sgd", "--out", str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    try:
        child = _wait_for(lambda: children.read_text().split()[:1])[0]
        _wait_for(lambda: list(tmp_path.glob("runs/*.log")))
        parent.send_signal(sent)
        parent.wait(60)
    finally:
        parent.kill()
    _wait_for(lambda: not Path(f"/proc/{child}").exists() or "(zombie)" in Path(f"/proc/{child}/status").read_text())


def _wait_for(look, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_swas_rate_is_constant_from_where_its_average_starts(tmp_path, monkeypatch):
    rates = []

    class Notes(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append((trainer.current_epoch, trainer.optimizers[0].param_groups[0]["lr"]))

    make = run_module.make_trainer

    def make_and_note(*arguments):
        trainer = make(*arguments)
        trainer.callbacks.append(Notes())
        return trainer

    monkeypatch.setattr(run_module, "make_trainer", make_and_note)
    record_of("swa", tmp_path, lr=0.1, task=dataclasses.replace(TASK, epochs=12))
    late = [rate for epoch, rate in rates if 9 <= epoch < 12]
    assert late == [pytest.approx(0.05)] * 18


def test_the_small_task_has_its_own_defaults_and_the_command_line_has_the_last_word():
    assert _parse(["allcnn"]).width is None
    small = _parse(["allcnn", "--small", "--n_train", "100"])
    assert (small.width, small.n_train, small.flip, small.precision) == (48, 100, False, "bf16-mixed")
