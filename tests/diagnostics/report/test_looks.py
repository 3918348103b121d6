"""Looks within a budget, by a clock of their own: what is taken, what is left out, and when the run ends."""

import functools
import math

import pytest
import torch

from lightning_entropy.diagnostics.local_entropy import LocalEntropyResult
from lightning_entropy.diagnostics.report import findings
from lightning_entropy.diagnostics.report.data import Data
from lightning_entropy.diagnostics.report.looks import look, rounded_up, sizes
from lightning_entropy.diagnostics.report.pace import Line, Pace
from tests.diagnostics import tiny

pytestmark = tiny.LIGHTNING_ADVICE
ONE = Line(0.0, 0.001)
PACE = Pace(10**5, 64, ONE, ONE, ONE, ONE, 1e-7)


class Machine:
    """Estimators that take what the pace says, times a factor, and evaluate their loss on the way."""

    def __init__(self, monkeypatch, factors=(1.0, 1.0, 1.0), drawing=0.5):
        self.now, self.asked, self.settings, self.drawing = 100.0, [], {}, drawing
        self.factors = dict(zip(("hessian", "local_entropy", "gradient_noise"), factors, strict=True))
        monkeypatch.setattr(findings, "loss_and_error", functools.partial(self.run, "loss"))
        for section in self.factors:
            monkeypatch.setitem(findings.ESTIMATORS, section, functools.partial(self.run, section))

    def run(self, section, module, data, *, loss, examples=0, **settings):
        self.asked.append((section, examples))
        self.settings[section, examples] = settings
        seconds = self.factors.get(section, 1.0) * PACE.seconds(section, settings, examples)
        for _ in range(100):
            self.now += seconds / 100
            if loss is not None:
                loss(module, data[0])
        return section, examples

    def look(self, subjects, **given):
        def grown():
            self.now += self.drawing

        look(subjects, pace=PACE, clock=lambda: self.now, grown=grown, **given)
        return self.now - 100.0


def subjects(count=1, **given):
    module, data = tiny.TinyModule(width=5), tiny.TinyData()
    data.setup("fit")
    return [findings.Subject(module, Data.of(data), title=str(i), **given) for i in range(count)]


@pytest.mark.parametrize("budget", [10.0, 40.0, 60.0, 300.0, 2000.0])
@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (0.2, 0.2, 0.2), (5.0, 2.0, 1.0), (1.0, 9.0, 1.0)])
def test_it_ends_within_its_budget_and_says_with_which_it_would_do_all(monkeypatch, budget, factors):
    machine, (subject,) = Machine(monkeypatch, factors), subjects()
    assert machine.look([subject], examples=512, budget=budget) <= 1.1 * budget
    assert "loss" in subject.findings.results
    if left := subject.findings.left:
        (needed,) = {each.budget for each in left.values()}
        assert needed > budget
        if not all(each.examples for each in left.values()):
            return  # how far off the count is for it is not known yet
        machine, (again,) = Machine(monkeypatch, factors), subjects()
        spent = machine.look([again], examples=512, budget=2.0 * needed)
        assert again.findings.left == {}
        assert spent > needed / 6, "and not far less"
    else:
        assert subject.findings.results["hessian"] == ("hessian", 512)


def test_the_budget_that_is_said_is_enough(monkeypatch):
    machine, (subject,) = Machine(monkeypatch), subjects()
    machine.look([subject], examples=512, budget=60.0)
    (needed,) = {each.budget for each in subject.findings.left.values()}
    machine, (again,) = Machine(monkeypatch), subjects()
    assert machine.look([again], examples=512, budget=needed) <= needed
    assert again.findings.left == {}


def test_cheap_looks_come_first_with_few_examples_and_draws(monkeypatch):
    machine, (subject,) = Machine(monkeypatch), subjects()
    machine.look([subject], examples=512, budget=100.0)
    first = [section for section, _ in machine.asked[:4]]
    assert first == ["loss", "gradient_noise", "hessian", "local_entropy"]
    costs = [PACE.seconds(section, machine.settings[section, 32], 32) for section in first[1:]]
    assert costs == sorted(costs)
    coarse, last = machine.settings["hessian", 32], subject.settings("hessian")
    assert {name: coarse[name] for name in findings.FEWEST["hessian"]} == findings.FEWEST["hessian"]
    assert coarse["dense_limit"] == last["dense_limit"]
    assert machine.settings["local_entropy", 32]["sigmas"] == [0.001, 0.01, 0.1]
    assert subject.settings("local_entropy")["sigmas"] == findings.VALLEY["sigmas"]


def test_with_much_time_the_looks_on_the_way_are_left_out(monkeypatch):
    machine, (subject,) = Machine(monkeypatch), subjects()
    machine.look([subject], examples=512, budget=1e5)
    assert {size for section, size in machine.asked if section == "hessian"} == {32, 512}


def test_a_look_that_takes_longer_than_thought_is_ended_and_the_one_before_stays(monkeypatch):
    machine, (subject,) = Machine(monkeypatch, (1.0, 50.0, 1.0)), subjects()
    spent = machine.look([subject], examples=512, budget=60.0, skip=["hessian", "gradient_noise"])
    assert spent <= 66.0
    assert ("local_entropy", 32) in machine.asked
    assert "local_entropy" not in subject.findings.results
    assert subject.findings.left["local_entropy"].examples == 0
    assert subject.findings.left["local_entropy"].budget > 60


def test_of_a_large_net_the_loss_is_measured_and_the_rest_said(monkeypatch):
    machine, (subject,) = Machine(monkeypatch), subjects()
    machine.look([subject], examples=512, budget=0.05)
    assert machine.asked == [("loss", 0)]
    assert set(subject.findings.left) == {"loss", "hessian", "local_entropy", "gradient_noise"}


def test_two_checkpoints_are_looked_at_alike_and_without_a_budget_once(monkeypatch):
    machine, pair = Machine(monkeypatch), subjects(2)
    machine.look(pair, examples=300, budget=None, skip=["loss", "gradient_noise"])
    assert machine.asked == [("hessian", 300)] * 2 + [("local_entropy", 300)] * 2
    assert machine.settings["local_entropy", 300]["draws"] == findings.VALLEY["draws"]
    assert pair[0].findings.left == {}
    machine = Machine(monkeypatch)
    pair = subjects(2)
    machine.look(pair, examples=300, budget=60.0, skip=["gradient_noise"])
    assert pair[0].findings.results == pair[1].findings.results
    assert pair[0].findings.left == pair[1].findings.left != {}


def test_what_the_user_has_set_is_what_the_last_look_has(monkeypatch):
    (subject,) = subjects(settings={"hessian": {"probes": 3, "products": 77, "top": 1}})
    assert subject.settings("hessian")["probes"] == 3
    coarse = subject.settings("hessian", 1 / 16)
    assert (coarse["probes"], coarse["top"], coarse["products"]) == (3, 1, 40), "never more than was asked for"


def test_every_section_s_share_is_of_settings_that_it_has():
    (subject,) = subjects(settings={"hessian": {"probes": 8, "top": 5, "steps": 40}})
    for section, fewest in findings.FEWEST.items():
        own = findings.ESTIMATORS[section].__kwdefaults__
        assert set(fewest) <= set(own)
        for name, number in fewest.items():
            assert number >= (2 if name in ("groups", "draws", "chains", "probes") else 1)
    assert subject.settings("loss") == {}


def test_the_bounds_of_the_arguments():
    for given, words in (({"budget": 0.0}, "budget must be > 0"), ({"examples": 0}, "examples must be at least 1"),
                         ({"skip": ["x"]}, "skip must name sections among")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            look(subjects(), **given)
    assert sizes(1) == [1]
    assert [rounded_up(s) for s in (0.2, 3.0, 99.5, 101.0)] == [1, 3, 100, 110]


def count(section, settings, examples, batch, **lines):
    """Evaluations of a loss by an estimator, and by the pace's count."""
    calls = 0

    def loss(module, given):
        nonlocal calls
        calls += 1
        return torch.nn.functional.cross_entropy(module(given[0]), given[1])

    net, batches = tiny.net(width=40), tiny.data(examples, batch)
    found = findings.ESTIMATORS[section](net, batches, loss=loss, examples=examples, **settings)
    climbed = 2 * len(found.gammas) - 1 if isinstance(found, LocalEntropyResult) else None
    nothing = dict.fromkeys(("value", "gradient", "graph", "product"), Line())
    pace = Pace(403, batch, **(nothing | lines))
    return calls, pace.seconds(section, settings | {"climbed": climbed}, examples)


@pytest.mark.parametrize("batch", [32, 8])
@pytest.mark.parametrize("groups", [0, 4])
def test_passes_of_local_entropy_are_counted(batch, groups):
    settings = {"chains": 2, "samples": 5, "warmup": 3, "leaps": 2, "draws": 4, "sigmas": [0.01, 0.1], "groups": groups}
    calls, counted = count("local_entropy", settings, 32, batch, value=Line(1.0), gradient=Line(1.0))
    assert counted == pytest.approx(calls, rel=0.1)


@pytest.mark.parametrize("batch", [32, 8])
@pytest.mark.parametrize("groups", [0, 4])
def test_graphs_of_the_hessian_are_counted(batch, groups):
    settings = {"top": 2, "bottom": 1, "probes": 4, "steps": 12, "products": 20, "dense_limit": 0, "groups": groups,
                "tolerance": 1e-12}  # fmt: skip
    calls, counted = count("hessian", settings, 32, batch, graph=Line(1.0))
    # Of one batch there is one graph; a spectrum is not found in so few products.
    assert counted == pytest.approx(calls, rel=0.15, abs=3)


def test_a_time_for_every_pass_is_measured_where_it_can_be():
    (subject,) = subjects()
    pace = subject.pace()
    lines = [pace.value, pace.gradient, pace.graph, pace.product]
    assert all(line.over(32) > 0 and line.batch >= 0 for line in lines)
    assert pace.eigen > 0 and pace.batch_size == 8
    assert pace.weights == sum(p.numel() for p in tiny.TinyModule(width=5).parameters())
    (broken,) = subjects(loss=lambda module, batch: "nothing")
    assert broken.pace().seconds("local_entropy", broken.settings("local_entropy"), 64) == 0


def test_a_line_through_two_times_is_not_below_either():
    assert Line.through(4, 1.0, 32, 1.0).over(32) == 1.0
    assert Line.through(4, 1.0, 32, 16.0).batch == 0.0
    assert math.isclose(Line.through(1, 2.0, 1, 2.0).over(10), 20.0)
