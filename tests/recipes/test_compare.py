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
import torch
from torch import nn

import lightning_entropy as le
from recipes.compare import report
from recipes.compare import run as run_module
from recipes.compare import study as study_module
from recipes.compare.__main__ import _parse
from recipes.compare.__main__ import main as compare
from recipes.compare.budget import Budget
from recipes.compare.measure import error_and_loss, loss_rise, reestimated
from recipes.compare.methods import METHODS, Method, Parts
from recipes.compare.run import Run, Task, execute
from recipes.compare.study import Study
from recipes.data.cache import write

pytestmark = pytest.mark.filterwarnings("ignore")

TASK = Task(
    net="lenet",
    data={"source": "random_grey", "n_train": 192, "n_val": 64, "batch_size": 32, "eval_batch_size": 256},
    epochs=3,
    weight_decay=0.0,
    points=2,
    accelerator="cpu",
    eval_images=128,
)


def record_of(method, folder, lr=0.05, seed=0, budget="compute", task=TASK):
    return json.loads(execute(Run(task, method, lr, seed, budget), Path(folder)).read_text())


# The budget


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_spends_the_same_gradient_evaluations(method, tmp_path):
    # Counted by a hook on a weight, not by what the methods say of themselves.
    record = record_of(method, tmp_path)
    assert record["gradient_evaluations"] == 3 * 192 // 32
    assert record["steps"] * Method.parse(method).evaluations * record["replicas"] == 18
    end = record["curve"][-1]
    assert (end["evaluations"], end["epochs"]) == (18, 3.0)
    # The first step, where a net may be compiled, is not timed.
    timed = 18 - Method.parse(method).evaluations * record["replicas"]
    assert record["images_per_second"] == pytest.approx(timed * 32 / record["seconds"])
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json"]


def test_equal_steps_cost_as_many_times_more_as_there_are_replicas(tmp_path):
    record = record_of("elastic_sgd:replicas=2", tmp_path, budget="steps")
    assert record["steps"] == 18
    assert record["gradient_evaluations"] == 36


def test_a_budget_too_small_for_a_step_is_refused():
    with pytest.raises(ValueError, match="epochs must leave a step for 3 replicas, got 1"):
        Budget(epochs=1, batches=2).steps(1, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [((0, 1, "compute"), "epochs must be >= 1"), ((1, 0, "compute"), "batches must be"), ((1, 1, "time"), "kind must")],
)
def test_budget_arguments_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Budget(*values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adam", "method must be one of sgd, ema"),
        ("sam:radius=1", "option must be one of sam's, rho, got radius"),
        ("swa:lr=1", "option must be one of swa's, start, lr_scale, annealing_epochs, got lr"),
        ("sgd:lr=1", "of which there is none"),
        ("sam:rho=0", "sam:rho=0: rho must be > 0, got 0"),
        ("elastic_sgd:replicas=0", "replicas must be an int >= 1, got 0 in elastic_sgd:replicas=0"),
        ("elastic_sgd:replicas=2.5", "replicas must be an int >= 1, got 2.5"),
        ("entropy_sgd:gama=1", "entropy_sgd:gama=1: .*unexpected keyword argument 'gama'"),
        ("entropy_sgd:gamma=-1", "entropy_sgd:gamma=-1: gamma must be"),
    ],
)
def test_unknown_methods_and_options_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Method.parse(text)


def test_options_reach_the_method():
    callback = Method.parse("entropy_sgd:inner_steps=7,gamma=0.5").parts(0.1, 100).callbacks[0]
    assert (callback.relaxation.inner_steps, callback.relaxation.gamma) == (7, 0.5)
    strategy = Method.parse("elastic_entropy:replicas=2,inner_steps=9").parts(0.1, 100).strategy(False)
    assert strategy.relaxation.inner_steps == 9


def test_a_run_has_another_name_when_a_default_has_changed(monkeypatch):
    names = {Run(TASK, method, 0.1, 0).name for method in ("lookahead", "elastic_sgd", "sgd")}
    changed = Parts([le.InnerOuterCallback(le.lookahead(7))])
    monkeypatch.setitem(METHODS, "lookahead", lambda **options: changed)
    assert len({Run(TASK, method, 0.1, 0).name for method in ("lookahead", "elastic_sgd", "sgd")} - names) == 1


# The measurements


def test_reestimated_statistics_are_the_mean_over_the_batches_and_leave_no_trace():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    batches = [(torch.randn(16, 3) + i, torch.zeros(16, dtype=torch.int64)) for i in range(3)]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        outputs = [net[0](images) for images, _ in batches]
    with reestimated(net, batches):
        assert not net[2].training
        torch.testing.assert_close(net[1].running_mean, torch.stack([y.mean(0) for y in outputs]).mean(0))
        torch.testing.assert_close(net[1].running_var, torch.stack([y.var(0) for y in outputs]).mean(0))
    assert net[1].training
    assert net[1].momentum == 0.1
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_noise_reaches_the_weights_under_bfloat16(tmp_path):
    # Autocast may keep rounded copies of the weights, which would not follow what is done to them.
    single, half = (
        record_of("sgd", tmp_path, task=dataclasses.replace(TASK, precision=precision))["final"]["loss_rise"]
        for precision in ("32-true", "bf16-mixed")
    )
    assert half == pytest.approx(single, rel=0.25)


def test_error_and_loss_are_those_of_the_net_in_evaluation_mode():
    net = nn.Sequential(nn.Dropout(0.9), nn.Identity()).train()
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([1, 1, 1, 1])
    error, loss = error_and_loss(net, [(logits[:3], labels[:3]), (logits[3:], labels[3:])])
    assert error == 25
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert net[0].training


def test_the_noise_on_a_filter_has_the_given_share_of_its_norm():
    class Watched(nn.Module):
        """Keeps the weights it was evaluated at."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 500), 2.0))
            self.seen = []

        def forward(self, images):
            self.seen.append(self.weight.detach().clone())
            return images

    net = Watched()
    assert loss_rise(net, [(torch.zeros(1, 2), torch.tensor([0]))], ratio=0.1, draws=20) == 0
    assert torch.equal(net.weight, torch.full((2, 500), 2.0))
    noise = torch.stack(net.seen[1:]) - 2.0
    norms = noise.norm(dim=2) / torch.full((500,), 2.0).norm()
    assert noise.shape == (20, 2, 500)
    torch.testing.assert_close(norms.square().mean().sqrt(), torch.tensor(0.1), rtol=0.02, atol=0)


def test_loss_rise_is_the_same_noise_every_time_and_grows_with_it():
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    batches = [(torch.randn(64, 5), torch.zeros(64, dtype=torch.int64))]
    assert loss_rise(net, batches) == loss_rise(net, batches)
    assert loss_rise(net, batches, ratio=2.0, draws=50) > loss_rise(net, batches, ratio=0.1, draws=50)


def test_swa_is_judged_by_its_average(tmp_path, monkeypatch):
    judged = []
    final = run_module.Judge.final
    monkeypatch.setattr(run_module.Judge, "final", lambda self, m: judged.append(m) or final(self, m))
    record_of("swa:start=0.34", tmp_path)
    end = next(judged[0].parameters()).detach().clone()
    record_of("sgd", tmp_path)
    assert not torch.equal(end, next(judged[1].parameters()))


# The study


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
    assert comparison.chosen(search) == {("sgd", "compute"): 0.01, ("sam", "compute"): 0.1}
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
    assert table in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


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
    assert list(comparison.chosen(search).values()) == [0.05]
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
        monkeypatch.setattr(study_module.os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        assert study_module._shares(workers) == shares


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
