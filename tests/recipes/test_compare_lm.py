"""The comparison of what replicas send: its trainings, its arithmetic, its tables."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest

import lightning_entropy as le
from recipes.compare.__main__ import main as compare
from recipes.compare.lm import run as run_module
from recipes.compare.lm import study as study_module
from recipes.compare.lm.command import parse
from recipes.compare.lm.methods import METHODS, Arm
from recipes.compare.lm.report import picture, report, tables
from recipes.compare.lm.run import Run, Task, execute
from recipes.compare.lm.speed import link_seconds, step_seconds
from recipes.compare.lm.study import Study

pytestmark = pytest.mark.filterwarnings("ignore")

NET = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
WEIGHTS = 256 * 16 + 12 * 16**2 + 3 * 16


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 200)
    return Task(net=NET, files=[str(path)], batch_size=8, val_windows=16, steps=12)


def study(task, tmp_path, **changes):
    values = {"methods": list(METHODS), "vary": list(METHODS), "replicas": [2, 4, 8], "inner_steps": [10, 30, 100]}
    values |= {"formats": ["float32", "int8"], "lrs": [1e-3, 1e-2], "seeds": 2, "out": tmp_path, "workers": 0}
    return Study(task, **values | changes)


def fake(run, folder):
    """A training that takes no time: best at 0.01 and with momentum 0.9, worse the less it sends."""
    settings = run.settings
    loss = 2 + 10 * abs(settings["lr"] - 0.01) - 0.1 * settings.get("outer_momentum", 0) + 0.001 * run.arm.inner_steps
    sent = 0 if run.replicas == 1 else 1000 / max(run.arm.inner_steps, 1)
    record = {"run": json.loads(run.to_json()), "tokens": 1, "parameters": WEIGHTS, "val_loss": loss + run.seed / 100}
    record |= {"bytes_per_token": sent, "seconds": 1.0, "text": "0", "versions": {"torch": "0"}}
    path = folder / f"{run.name}.json"
    path.write_text(json.dumps(record))
    return path


def test_an_arm_differs_from_the_centre_in_one_thing(task, tmp_path):
    found = study(task, tmp_path)
    assert found.center == (4, 30, "float32")
    arms = found.arms()
    assert len(set(arms)) == len(arms)
    assert {arm.method for arm in arms} == set(METHODS)
    own = [(a.replicas, a.inner_steps, a.format) for a in arms if a.method == "diloco"]
    others = [(2, 30, "float32"), (8, 30, "float32"), (4, 10, "float32"), (4, 100, "float32"), (4, 30, "int8")]
    assert sorted(own) == sorted([(4, 30, "float32"), *others])
    assert [(a.replicas, a.inner_steps) for a in arms if a.method == "ddp"] == [(4, 0), (2, 0), (8, 0)]
    alone = [(a.method, a.replicas, a.inner_steps) for a in arms if a.method in ("adamw", "lookahead", "snoo")]
    assert alone == [("adamw", 1, 0), ("lookahead", 1, 5), ("snoo", 1, 30)]
    assert len(study(task, tmp_path, vary=["diloco"]).arms()) == len(METHODS) + 5


def test_every_method_searches_and_keeps_its_own_best(task, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "execute", fake)
    found = study(task, tmp_path)
    runs = found.search_runs()
    assert [dict(run.settings) for run in runs if run.arm.method == "adamw"] == [{"lr": 1e-3}, {"lr": 1e-2}]
    assert len([run for run in runs if run.arm.method == "diloco"]) == 6
    chosen = found.chosen(found.train(runs))
    assert chosen["adamw"] == {"lr": 0.01}
    assert chosen["diloco"] == {"lr": 0.01, "outer_momentum": 0.9}
    finals = found.final_runs(chosen)
    assert len(finals) == 2 * len(found.arms())
    assert {run.name for run in runs} & {run.name for run in finals}, "seed 0 of the search is the comparison's"


def test_an_outer_rate_that_falls_is_tried_with_each_momentum(task, tmp_path):
    found = study(task, tmp_path, outer_finals=(1.0, 0.3))
    assert len(found.tried("adamw")) == 2
    tried = [METHODS["diloco"].relaxation(30, settings) for settings in found.tried("diloco")]
    falling = le.Warmup(0.21, 0.9, start=0.7)
    constant, fallen = le.diloco(30, outer_momentum=0.8), le.diloco(30, outer_lr=falling, outer_momentum=0.8)
    assert len(tried) == 12 and tried.count(constant) == tried.count(fallen) == 2
    assert METHODS["streaming_diloco"].relaxation(30, found.tried("streaming_diloco")[1]).outer_lr == falling
    shorter = study(task, tmp_path, outer_finals=(0.3,), outer_fall=0.5).tried("palsgd")[0]
    assert METHODS["palsgd"].relaxation(30, shorter).outer_lr == le.Warmup(0.21, 0.5, start=0.7)


def test_a_search_that_diverges_is_chosen_last(task, tmp_path):
    records = [
        {"val_loss": loss, "run": {"arm": {"method": "adamw"}, "settings": {"lr": lr}}}
        for lr, loss in ((0.1, math.nan), (0.2, 3.0), (0.3, math.nan))
    ]
    assert study(task, tmp_path).chosen(records)["adamw"] == {"lr": 0.2}


def test_steps_in_equal_time_are_what_the_link_leaves(task, tmp_path):
    found = study(task, tmp_path, methods=["ddp", "local_sgd", "elastic_sgd", "adamw"], vary=["ddp"])
    seconds = dict.fromkeys(found.arms(), 0.01)
    # On the wire: 8 * bytes a token * 128 tokens / 4 replicas / 1e8 bits a second.
    sent = {"ddp": 0.02, "local_sgd": 0.0025, "elastic_sgd": 0.005}
    records = [
        {"run": {"arm": dataclasses.asdict(arm)}, "bytes_per_token": 1e8 * sent.get(arm.method, 0) / 8 / 128 * 4}
        for arm in found.arms()
    ]
    steps = {arm.method: count for arm, count in found.timed_steps(records, seconds).items()}
    assert steps == {"ddp": 6, "local_sgd": 9, "elastic_sgd": 12}  # of 12: half, four fifths, all
    assert {run.steps for run in found.timed_runs({name: {"lr": 1.0} for name in METHODS}, {Arm("ddp", 4): 6})} == {6}


def test_what_hides_an_exchange():
    """Four fragments of four steps each: of 32 steps half."""
    methods = {"ddp": 1, "local_sgd": 0, "diloco": 0, "streaming_diloco": 0.5, "elastic_sgd": 1, "parle": 1}
    assert {name: METHODS[name].hidden(32) for name in methods} == methods
    assert METHODS["streaming_diloco"].hidden(10) == 1
    assert METHODS["streaming_diloco"].relaxation(3, {"outer_momentum": 0.9}).delay == 2


def test_link_seconds():
    assert link_seconds(0.1, 1e6, 1e8, hidden=1) == 0.1
    assert link_seconds(0.1, 1e6, 1e7, hidden=1) == pytest.approx(0.8)
    assert link_seconds(0.1, 1e6, 1e7, hidden=0.5) == pytest.approx(0.85)
    assert link_seconds(0.1, 1e6, 1e7, hidden=0) == pytest.approx(0.9)


def test_methods_of_one_replica_alone_have_a_picture_too(task, tmp_path):
    """Of nothing, as nothing is sent; the tables are what one wants of them."""
    assert picture(study(task, tmp_path, methods=["adamw", "gpa"], vary=[]), []).axes


def test_times_of_steps_are_kept_and_shared_by_arms_of_the_same_inner_step(task, tmp_path):
    arms = [Arm("adamw"), Arm("heat", inner_steps=1), Arm("diloco", 2, 3), Arm("parle", 2, 3)]
    first = step_seconds(task, arms, tmp_path / "seconds.json", rounds=1)
    assert set(first) == set(arms) and min(first.values()) > 0
    known = json.loads((tmp_path / "seconds.json").read_text())
    assert sorted(known) == [
        "adamw, 1 replicas", "adamw, 1 replicas, heat", "adamw, 2 replicas", "adamw, 2 replicas, parle"
    ]  # fmt: skip
    later = step_seconds(task, [*arms, Arm("ddp", 2), Arm("ddp", 4)], tmp_path / "seconds.json", rounds=1)
    assert later.items() >= first.items()
    assert later[Arm("ddp", 2)] == first[Arm("diloco", 2, 3)]


def test_a_run_is_what_its_text_says_and_its_name_is_its_own(task):
    run = Run(task, Arm("diloco", 4, 30, "int8"), {"lr": 0.01, "outer_momentum": 0.9}, 0, 12)
    assert Run.from_json(run.to_json()) == run
    assert (run.replicas, run.module) == (4, "recipes.compare.lm.run")
    assert str(run) == "diloco, 4 replicas, H = 30, int8, lr 0.01, outer_momentum 0.9, 12 steps, seed 0"
    changes = [
        {"seed": 1},
        {"steps": 6},
        {"arm": Arm("diloco", 4, 10, "int8")},
        {"settings": {"lr": 0.01, "outer_momentum": 0.5}},
        {"task": dataclasses.replace(task, beta2=0.99)},
        {"task": dataclasses.replace(task, final=0.0)},
    ]
    assert len({run.name} | {dataclasses.replace(run, **change).name for change in changes}) == 7


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_beta2_is_the_inner_optimizers(name, task):
    assert dataclasses.replace(task, beta2=0.99).optimizer(METHODS[name], 0.01).keywords["betas"] == (0.9, 0.99)
    assert parse(["--beta2", "0.99"]).beta2 == 0.99


def test_gpa_has_the_momentum_and_adamw_none_beside_it(task):
    assert task.optimizer(METHODS["gpa"], 0.01).keywords["betas"] == (0.0, 0.95)


def test_the_rate_falls_to_its_end(task):
    final = run_module.make_module(
        Run(dataclasses.replace(task, final=0.25), Arm("adamw"), {"lr": 0.01}, 0, 12)
    ).schedule
    assert final(1.0) == 0.25 and parse(["--final", "0"]).final == 0


def record(task, folder, arm, **settings):
    return json.loads(execute(Run(task, arm, {"lr": 0.01} | settings, 0, task.steps), Path(folder)).read_text())


@pytest.mark.processes
def test_ddp_is_adamw_alone_and_sends_its_gradients(task, tmp_path):
    alone, ddp = record(task, tmp_path, Arm("adamw")), record(task, tmp_path, Arm("ddp", 2))
    assert alone["parameters"] == WEIGHTS
    assert ddp["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)
    assert alone["bytes_per_token"] == 0
    # Two ranks that send 4 bytes a weight and step, of 8 windows of 16 tokens.
    assert ddp["bytes_per_token"] == pytest.approx(2 * 4 * WEIGHTS / (8 * 16))


@pytest.mark.processes
@pytest.mark.parametrize(("format", "size"), [("float32", 4), ("int4", 0.5 + 4 / 128)])
def test_bytes_of_local_sgd(format, size, task, tmp_path):
    sent = record(task, tmp_path, Arm("local_sgd", 2, 4, format))["bytes_per_token"]
    padded = WEIGHTS if format == "float32" else -(-WEIGHTS // 2048) * 2048
    # An exchange every 4 steps, with a header of a few bytes.
    assert 0 < sent * 4 * 8 * 16 / 2 - size * padded <= 64


@pytest.mark.parametrize(
    "method",
    [
        "ema",
        "lookahead",
        "entropy_sgd",
        "hamilton_jacobi",
        "heat",
        "smoothed_lookahead",
        "gpa",
        "two_timescale",
        "snoo",
        "muon_snoo",
    ],
)
def test_methods_of_one_replica_train(method, task, tmp_path):
    if method == "muon_snoo" and not hasattr(run_module.torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    arm = Arm(method, inner_steps=4 if METHODS[method].relaxation else 0)
    assert record(task, tmp_path, arm, outer_momentum=0.5)["val_loss"] < math.log(256) - 0.5


@pytest.mark.processes
def test_replicas_know_how_long_a_rate_falls(task, tmp_path, monkeypatch):
    """Twelve steps are three loops of four, of which nine tenths are three outer steps."""
    arm, momentum = Arm("diloco", 2, 4), {"outer_momentum": 0.5}
    share, constant = (record(task, tmp_path, arm, **momentum, outer_final=final) for final in (0.5, 1.0))
    counted = le.diloco(4, outer_lr=le.Warmup(0.35, 3, start=0.7), outer_momentum=0.5)
    monkeypatch.setitem(METHODS, "diloco", dataclasses.replace(METHODS["diloco"], relaxation=lambda *_: counted))
    assert share["val_loss"] == record(task, tmp_path, arm, **momentum)["val_loss"] != constant["val_loss"]


@pytest.mark.processes
def test_replicas_that_diverge_are_a_result(task, tmp_path):
    found = record(task, tmp_path, Arm("local_sgd", 2, 4), lr=1e30)
    assert math.isnan(found["val_loss"]) and math.isnan(found["bytes_per_token"])


@pytest.mark.processes
def test_the_quick_comparison_runs_and_goes_on_where_it_was(task, tmp_path, capsys):
    arguments = ["lm", "--quick", "--workers", "0", "--out", str(tmp_path / "out"), "--files", *task.files]
    arguments += ["--steps", "6", "--replicas", "2", "--inner_steps", "3", "--block_size", "16", "--n_embd", "16"]
    compare(arguments)
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    for heading in (
        "Replicas at equal tokens: 1,536 in 6 steps",
        "Equal time at 100 Mbit/s, 2 replicas",
        "One replica",
    ):
        assert f"### {heading}" in table
    assert "| diloco | 2 | 3 | int8 | lr 0.01, momentum 0." in table
    assert "Lightning registers communication hooks on CUDA alone" in table
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert {row["budget"] for row in rows} == {"equal tokens", "equal time"}
    assert (tmp_path / "out" / "bytes.png").read_bytes()[:4] == b"\x89PNG"
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    compare(arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()} == files


def test_tables_say_what_is_lost_and_what_diverged(task, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "execute", fake)
    found = study(task, tmp_path, vary=[])
    chosen = found.chosen(found.train(found.search_runs()))
    final = found.train(found.final_runs(chosen))
    seconds = dict.fromkeys(found.arms(), 0.01)
    timed = found.train(found.timed_runs(chosen, found.timed_steps(final, seconds)))
    report(found, chosen, final, timed, seconds)
    table = (tmp_path / "table.md").read_text()
    # 2 + 0.03 - 0.09 for H = 30 and momentum 0.9 against DDP's 2.
    assert "| diloco | 4 | 30 | float32 | lr 0.01, momentum 0.9 | 1.9450 +- 0.0071 | -2.99% | 33.3 | 3.33% |" in table
    assert "| elastic_sgd | 4 | 30 | float32 | lr 0.01 | 2.0350 +- 0.0071 | +1.50% |" in table
    assert "| snoo | 30 | lr 0.01, momentum 0.9 | 1.9450 +- 0.0071 | -2.99% |" in table
    lost = [r if r["run"]["arm"]["method"] != "parle" else r | {"val_loss": math.nan} for r in final]
    assert "| parle | 4 | 30 | float32 | lr 0.01 | diverged (2 of 2) |  |" in tables(
        found, chosen, lost, timed, seconds
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lrs": []}, "lrs must be different ones, at least one, got"),
        ({"formats": ["int8", "int8"]}, "formats must be different ones"),
        ({"replicas": [3]}, "replicas must be above 1 and divide batch_size = 8, got 3"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changes, message, task, tmp_path):
    with pytest.raises(ValueError, match=message):
        study(task, tmp_path, **changes)


def test_the_command_line_says_that_it_is_there(capsys):
    for arguments, said in ((["--help"], "python -m recipes.compare lm --help"), (["lm", "--help"], "--quick")):
        with pytest.raises(SystemExit) as ended:
            compare(arguments)
        assert ended.value.code == 0
        assert said in " ".join(capsys.readouterr().out.split())
    assert parse(["--quick"]).steps < parse([]).steps
    assert parse(["--quick", "--steps", "7"]).steps == 7
    with pytest.raises(SystemExit):
        parse(["--outer_finals", "0"])  # an outer rate of 0 would be refused near the end of the training


def test_a_run_has_another_name_when_a_methods_default_has_changed(task, monkeypatch):
    run = Run(task, Arm("local_sgd", 4, 30), {"lr": 0.01}, 0, 12)
    name = run.name
    monkeypatch.setattr(le.Relaxation, "__repr__", lambda self: "of what differs from the defaults")
    assert run.name == name
    method = dataclasses.replace(METHODS["local_sgd"], relaxation=lambda inner_steps, _: le.local_sgd(inner_steps + 1))
    monkeypatch.setitem(METHODS, "local_sgd", method)
    assert run.name != name
