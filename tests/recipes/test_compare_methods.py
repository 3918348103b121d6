"""Every method spends the same budget, and takes the options it has."""

import dataclasses

import lightning as L
import pytest

import lightning_entropy as le
from recipes.compare.budget import Budget
from recipes.compare.methods import METHODS, Method, Parts
from recipes.compare.run import Run
from tests.recipes.comparison import TASK, record_of

pytestmark = pytest.mark.filterwarnings("ignore")


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


def test_ddp_is_sgd_with_as_many_batches_in_one(tmp_path):
    """Its ranks share each epoch's plan, batch by batch, so the images of a step are the larger batch's."""
    task = dataclasses.replace(TASK, net="mlp")
    large = dataclasses.replace(task, data=task.data | {"batch_size": 64})
    ddp, sgd = (record_of(m, tmp_path / m[:3], task=t) for m, t in (("ddp:replicas=2", task), ("sgd", large)))
    assert (ddp["steps"], ddp["gradient_evaluations"], sgd["steps"]) == (9, 18, 9)
    for key in ("train_loss", "val_loss", "test_loss", "loss_rise"):
        assert ddp["final"][key] == pytest.approx(sgd["final"][key], rel=1e-4), key


@pytest.mark.parametrize(("method", "end"), [("ema", 0.0), ("ema:final=0.25", 0.25), ("ema:final=1", 1.0)])
def test_an_average_may_stand_in_the_place_of_the_rates_decay(method, end, tmp_path, monkeypatch):
    rates = []
    fit = L.Trainer.fit

    def fitted(trainer, module, **kwargs):
        fit(trainer, module, **kwargs)
        rates.extend(trainer.lr_scheduler_configs[0].scheduler.get_last_lr())

    monkeypatch.setattr(L.Trainer, "fit", fitted)
    record_of(method, tmp_path, lr=0.04)
    assert rates == [pytest.approx(0.04 * end)]


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
        ("adam", "method must be one of sgd, stopped"),
        ("sam:radius=1", "option must be one of sam's, rho, start, got radius"),
        ("swa:lr=1", "option must be one of swa's, start, lr_scale, annealing_epochs, got lr"),
        ("sgd:lr=1", "of which there is none"),
        ("sam:rho=0", r"sam:rho=0: rho must be in \[1e-12, 1000\], got 0"),
        ("elastic_sgd:replicas=0", r"replicas must be in \[1, 256\], got 0"),
        ("elastic_sgd:replicas=2.5", "replicas must be an int, got 2.5"),
        ("entropy_sgd:gama=1", "entropy_sgd:gama=1: .*no argument 'gama': did you mean gamma"),
        ("entropy_sgd:gamma=-1", "entropy_sgd:gamma=-1: gamma must be"),
        ("entropy_sgd:gamma=Pull(2)", r"entropy_sgd:gamma=Pull\(2\): share must be in \[0, 1\), got 2"),
        ("entropy_sgd:gamma=Pull(a)", r"entropy_sgd:gamma=Pull\(a\): "),
        ("heat:width=Growing(1)", r"heat:width=Growing\(1\): value must be a number, a word or one of Pull, .*Growing"),
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
    late = Method.parse("smoothed_lookahead:outer_lr=Starting(0.6, 0.5, 1.0),width=Warmup(0.2, 10)").relaxation
    assert late == le.smoothed_lookahead(outer_lr=le.Starting(0.6, at=0.5, before=1.0), width=le.Warmup(0.2, 10))


def test_a_run_has_another_name_when_a_default_has_changed(monkeypatch):
    monkeypatch.setattr(le.Relaxation, "__repr__", lambda self: "of what differs from the defaults")
    names = {Run(TASK, method, 0.1, 0).name for method in ("lookahead", "elastic_sgd", "sgd")}
    changed = Parts([le.InnerOuterCallback(le.lookahead(7))])
    monkeypatch.setitem(METHODS, "lookahead", lambda **options: changed)
    assert len({Run(TASK, method, 0.1, 0).name for method in ("lookahead", "elastic_sgd", "sgd")} - names) == 1
