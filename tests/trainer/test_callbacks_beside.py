"""The callbacks beside the rest of Lightning: its callbacks, tuner, loggers, strategies and command line."""

import copy
import csv
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.batch_size_finder import BatchSizeFinder
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

import lightning_entropy as le
from lightning_entropy.engine.arithmetic import rms_distance
from tests.lightning_modules import (
    BATCHES,
    CALLBACKS,
    LIGHTNING_WARNINGS,
    Automatic,
    Manual,
    Pair,
    Staircase,
    batchnorm_net,
    loader,
    outer_adam,
    same,
    trainer,
    weights,
)

pytestmark = [pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS]


# Logging


def logged(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row.get("entropy/outer_step") or row.get("entropy/0/outer_step")]


@pytest.mark.parametrize("every", [1, 7])
def test_what_is_logged_at_outer_steps(tmp_path: Path, every: int) -> None:
    """Against the weights before and after the batch: x - y by hand, for L = 5 and a running mean of weight 1/2."""
    y: list[list[Tensor]] = []

    class Look(L.Callback):
        """Read y after the optimizer's update and ours, which only an outer step hides."""

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            y.append(weights(pl_module))

    def relaxation(steps: int) -> le.Relaxation:
        return le.Relaxation(inner_steps=steps, gamma=le.Scoping(0.5, 0.1), average=0.5)

    # The same chain without an outer step shows every y of the first loop.
    trainer(callbacks=[le.InnerOuterCallback(relaxation(1000)), Look()], max_steps=6).fit(Automatic(), loader())
    x, z = weights(Automatic()), weights(Automatic())
    y = y[:5]  # the sixth, the last, closes the loop
    for step in y:
        z = [a.lerp(b, 0.5) for a, b in zip(z, step, strict=True)]
    logger = CSVLogger(tmp_path, name="", version="")
    callback = le.InnerOuterCallback(relaxation(5))
    trainer(callbacks=[callback], logger=logger, max_epochs=2, log_every_n_steps=every).fit(Automatic(), loader())
    rows = logged(tmp_path)
    outer_steps = [1, 2, 3, 4] if every == 1 else [2, 4]
    assert [int(float(row["entropy/outer_step"])) for row in rows] == outer_steps
    # Lightning's own metrics of a batch carry the same step.
    assert [int(row["step"]) for row in rows] == [5 * t - 1 for t in outer_steps]
    for row, t in zip(rows, outer_steps, strict=True):
        assert float(row["entropy/gamma"]) == pytest.approx(0.5 * 1.1 ** (t - 1))
        assert float(row["entropy/rho"]) == 0
        assert float(row["entropy/effective_epochs"]) == pytest.approx(5 * t / BATCHES)
    if every == 1:
        assert float(rows[0]["entropy/inner_distance"]) == pytest.approx(rms_distance(y[-1], x).item(), rel=1e-4)
        assert float(rows[0]["entropy/mean_distance"]) == pytest.approx(rms_distance(z, x).item(), rel=1e-4)


def test_metrics_of_several_optimizers_and_of_heat(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="pair", version="")
    trainer(callbacks=[CALLBACKS["entropy"]()], logger=logger, log_every_n_steps=1).fit(Pair(), loader())
    rows = logged(tmp_path / "pair")
    assert {"entropy/0/gamma", "entropy/1/gamma", "entropy/1/outer_step", "entropy/effective_epochs"} <= set(rows[0])
    logger = CSVLogger(tmp_path, name="heat", version="")
    trainer(callbacks=[CALLBACKS["heat"]()], logger=logger, log_every_n_steps=1).fit(Automatic(), loader())
    assert [int(float(row["entropy/outer_step"])) for row in logged(tmp_path / "heat")] == [1, 2, 3, 4]


@pytest.mark.parametrize("every", [1, 0])
def test_nothing_is_measured_where_nobody_logs(tmp_path: Path, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the distances nor the metrics; and no number is waited for in a training step."""
    read: list[str] = []
    training = True

    class Ends(L.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            nonlocal training
            training = False

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        real = getattr(Tensor, name)

        def count(self: Tensor, *args: Any, real: Any = real, name: str = name) -> Any:
            code = sys._getframe(1).f_code.co_filename
            if "lightning_entropy" in code and training:
                read.append(f"{code}: {name}")
            return real(self, *args)

        monkeypatch.setattr(Tensor, name, count)

    def fail(*_: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("lightning_entropy.engine.arithmetic.rms_distance", fail)
    monkeypatch.setattr("lightning_entropy.engine.module_loops.ModuleLoops.metrics", fail)
    logger = CSVLogger(tmp_path) if every == 0 else False
    callback = le.EntropySGD(5, 0.5, 0.01)
    trainer(callbacks=[callback, Ends()], logger=logger, log_every_n_steps=every).fit(Automatic("fused"), loader())
    assert callback.state_dict()["loops"][0]["outer_step"] == 2
    assert not training
    assert not read


# Other callbacks


def test_early_stopping_and_the_best_checkpoint(tmp_path: Path) -> None:
    t = trainer(tmp_path, callbacks=[EarlyStopping("val_loss", patience=0, min_delta=9), CALLBACKS["entropy"](),
                ModelCheckpoint(tmp_path, monitor="val_loss")], max_epochs=9, limit_val_batches=1,
                enable_checkpointing=True)  # fmt: skip
    module = Automatic()
    t.fit(module, loader(), loader(8))
    assert t.current_epoch == 2
    t.test(module, loader(8), ckpt_path="best", verbose=False)


def test_learning_rate_monitor(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = LearningRateMonitor("step")
    module = Automatic()

    def configure() -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    module.configure_optimizers = configure  # type: ignore[method-assign]
    t = trainer(callbacks=[monitor, CALLBACKS["entropy"]()], logger=logger, log_every_n_steps=1, max_epochs=2)
    t.fit(module, loader())
    assert monitor.lrs["lr-SGD"] == pytest.approx([0.1] * BATCHES + [0.01] * BATCHES)


@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_averages_y_and_keeps_the_loop(tmp_path: Path, first: bool) -> None:
    """It reads the parameters after a batch: y. Evaluation and the end are at its average; the loop does not notice."""
    plain, callback = CALLBACKS["entropy"](), CALLBACKS["entropy"]()
    ys: list[list[Tensor]] = []
    states: list[Any] = []

    class Look(L.Callback):
        def __init__(self, loop: le.EntropySGD) -> None:
            self.loop = loop

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            ys.append(weights(pl_module))

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            states.append(copy.deepcopy(self.loop.state_dict()["loops"][0]))

        def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            mean = ys[0]
            for y in ys[1:]:
                mean = [a.lerp(b, 0.2) for a, b in zip(mean, y, strict=True)]
            for a, b in zip(mean, weights(pl_module), strict=True):
                torch.testing.assert_close(a, b)

    alone = Automatic()
    trainer(callbacks=[plain, Look(plain)], max_epochs=2).fit(alone, loader())
    ys.clear()
    average = EMAWeightAveraging(decay=0.8)
    module = Automatic()
    callbacks = [callback, average, Look(callback)] if first else [average, callback, Look(callback)]
    t = trainer(callbacks=callbacks, max_epochs=2, val_check_interval=7, limit_val_batches=1)
    t.fit(module, loader(), loader(8))
    assert len(ys) == 2 * BATCHES
    expected, state = states[1], states[3]
    assert state["inner_step"] == expected["inner_step"] == 4
    for name in expected["slots"]:
        assert torch.equal(state["slots"][name]["average"], expected["slots"][name]["average"])
    assert not same(weights(module), weights(alone))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging_averages_x(first: bool, batchnorm: bool) -> None:
    """SWA reads the weights between epochs, when they are x, and ends with the mean of them."""
    callback = CALLBACKS["entropy"]()
    swa = StochasticWeightAveraging(0.1, swa_epoch_start=2, annealing_epochs=1)
    xs: list[list[Tensor]] = []

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if 1 <= trainer.current_epoch <= 3:
                xs.append(weights(pl_module))

    module = Automatic(net=batchnorm_net() if batchnorm else None)
    t = trainer(callbacks=[callback, swa, Look()] if first else [swa, callback, Look()], max_epochs=4)
    t.fit(module, loader())
    mean = [torch.stack(parts).mean(0) for parts in zip(*xs, strict=True)]
    assert len(xs) == 3
    for a, b in zip(mean, weights(module), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["callback", "tuner"])
def test_the_learning_rate_finder_tries_the_plain_optimizer_and_leaves_the_loop_alone(tmp_path: Path, how: str) -> None:
    module, callback = Automatic(), CALLBACKS["entropy"]()
    start = weights(module)
    finder = [LearningRateFinder(num_training_steps=30)] if how == "callback" else []
    t = trainer(tmp_path, callbacks=[*finder, callback], max_epochs=3)
    if how == "tuner":
        Tuner(t).lr_find(module, loader(), num_training=30)
        assert same(weights(module), start)
        assert not callback.state_dict()
    t.fit(module, loader())
    twin = Automatic(lr=module.lr)
    trainer(callbacks=[CALLBACKS["entropy"]()], max_epochs=3).fit(twin, loader())
    assert module.lr != 0.1
    assert same(weights(module), weights(twin))


class Sized(Automatic):
    """Its batch size can be searched."""

    batch_size = 2

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(loader().dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(8)


@pytest.mark.parametrize("how", ["callback", "tuner"])
def test_the_batch_size_finder(tmp_path: Path, how: str) -> None:
    module, callback = Sized(), CALLBACKS["entropy"]()
    finder = [BatchSizeFinder(max_trials=2, init_val=2, steps_per_trial=2)] if how == "callback" else []
    t = trainer(tmp_path, callbacks=[*finder, callback], max_epochs=2)
    if how == "tuner":
        Tuner(t).scale_batch_size(module, max_trials=2, init_val=2, steps_per_trial=2)
    t.fit(module)
    twin = Sized()
    twin.batch_size = module.batch_size
    trainer(callbacks=[CALLBACKS["entropy"]()], max_epochs=2).fit(twin)
    assert module.batch_size == 4
    assert same(weights(module), weights(twin))


# Refusals


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_put_parameters_together_are_refused(strategy: type) -> None:
    t = trainer()
    t.strategy.__class__ = strategy  # none of them can be made without its accelerator or library
    with pytest.raises(MisconfigurationException, match=f"got {strategy.__name__}: .* use ModelParallelStrategy"):
        CALLBACKS["entropy"]().setup(t, Automatic(), "fit")


def test_one_owner_of_the_loop() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(callbacks=[CALLBACKS["entropy"](), CALLBACKS["entropy"]()])
    t = trainer(callbacks=[CALLBACKS["entropy"](), CALLBACKS["heat"]()])
    with pytest.raises(MisconfigurationException, match="EntropySGD and HeatSmoothing: remove one"):
        t.fit(Automatic(), loader())
    t.callbacks = [c for c in t.callbacks if not isinstance(c, le.HeatSmoothing)]  # type: ignore[attr-defined]
    t.fit(Automatic(), loader())
    t.callbacks = [CALLBACKS["heat"]()]  # type: ignore[attr-defined]
    t.fit_loop.max_epochs = 2
    t.fit(Automatic(), loader())


def test_a_parameter_in_two_optimizers_is_refused() -> None:
    class Shared(Manual):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.net[2].parameters(), lr=0.1)]  # type: ignore[index]

    with pytest.raises(MisconfigurationException, match=r"in one optimizer, got several for \['net.2.bias'"):
        trainer(callbacks=[CALLBACKS["entropy"]()]).fit(Shared(), loader())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: le.EntropySGD(0), ValueError, "inner_steps must be .*>= 1, got 0"),
        (lambda: le.EntropySGD(gamma=-1.0), ValueError, "gamma must be .* >= 0, got -1"),
        (lambda: le.EntropySGD(noise=float("nan")), ValueError, "noise must be .*nan"),
        (lambda: le.EntropySGD(average=0), ValueError, r"average must be in \(0, 1\], got 0"),
        (lambda: le.EntropySGD(seed=-1), ValueError, "seed must be .*>= 0, got -1"),
        (lambda: le.EntropySGD(seed=0.5), TypeError, "seed must be an int"),  # type: ignore[arg-type]
        (lambda: le.EntropySGD(outer=3), TypeError, "outer must be"),  # type: ignore[arg-type]
        (lambda: le.EntropySGD(outer=lambda anchors: 3), TypeError, "outer must return a torch.optim.Optimizer"),  # type: ignore[arg-type,return-value]
        (lambda: le.HamiltonJacobi(outer_momentum=1.0), ValueError, r"outer_momentum must be in \[0, 1\), got 1"),
        (lambda: le.HeatSmoothing(gamma=0), ValueError, "gamma must be .*> 0"),
        (lambda: le.InnerOuterCallback("lookahead"), TypeError, "must be a Relaxation, .*got 'lookahead': a method"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused_when_the_callback_is_made(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


class Nonsense:
    """A schedule that turns bad at outer step 2."""

    def __call__(self, t: int) -> float:
        return 0.5 if t < 2 else float("nan")


def test_a_bad_schedule_stops_the_fit_before_any_weight_changed() -> None:
    module = Automatic()
    callback = le.EntropySGD(5, Nonsense())
    with pytest.raises(ValueError, match=r"gamma\(t=2\) must be .*nan"):
        trainer(callbacks=[callback]).fit(module, loader())
    twin = Automatic()
    trainer(callbacks=[le.EntropySGD(5, 0.5)], max_steps=10).fit(twin, loader())
    assert same(weights(module), weights(twin))


@pytest.mark.parametrize("automatic", [True, False])
def test_an_unstable_coupled_spring_warns_once(automatic: bool) -> None:
    module = Automatic() if automatic else Manual()
    with pytest.warns(UserWarning, match="must be below 2 .* got 2.5 with gamma = 25") as caught:
        trainer(callbacks=[le.EntropySGD(5, 25.0, coupled=True)], max_epochs=2).fit(module, loader())
    assert len([w for w in caught if "must be below 2" in str(w.message)]) == 1


# The command line


@pytest.fixture(autouse=True)
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runner's arguments are not LightningCLI's, and its calls of jsonargparse's old names not ours."""
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def cli(tmp_path: Path, callbacks: list[Any], *more: str) -> LightningCLI:
    quiet = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
        "default_root_dir": str(tmp_path),
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {**quiet, "callbacks": callbacks}}))
    return LightningCLI(
        Configured, seed_everything_default=0, args=["fit", f"--config={config}", *more],
        save_config_kwargs={"overwrite": True},
    )  # fmt: skip


class Configured(Automatic):
    """Brings its data."""

    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> Any:
        return loader()


def entropy(**init_args: Any) -> dict[str, Any]:
    return {"class_path": "lightning_entropy.EntropySGD", "init_args": init_args}


SCOPING = {"class_path": "lightning_entropy.Scoping", "init_args": {"start": 0.5, "rate": 0.1}}

CONFIGS: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": (entropy(inner_steps=5, gamma=0.5, noise=0.01, seed=3), lambda: le.EntropySGD(5, 0.5, 0.01, seed=3)),
    "default": (entropy(), lambda: le.EntropySGD()),
    "scoping": (entropy(inner_steps=5, gamma=SCOPING), lambda: le.EntropySGD(5, le.Scoping(0.5, 0.1))),
    "scoping in short": (
        entropy(inner_steps=5, gamma={"start": 0.5, "rate": 0.1}),
        lambda: le.EntropySGD(5, le.Scoping(0.5, 0.1)),
    ),
    "adam": (
        entropy(inner_steps=5, outer={"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}),
        lambda: le.EntropySGD(5, outer=outer_adam),
    ),
    "function": (
        entropy(inner_steps=5, outer="tests.lightning_modules.outer_adam"),
        lambda: le.EntropySGD(5, outer=outer_adam),
    ),
    "jacobi": (
        {"class_path": "lightning_entropy.HamiltonJacobi", "init_args": {"inner_steps": 5, "outer_momentum": 0.5}},
        lambda: le.HamiltonJacobi(5, outer_momentum=0.5),
    ),
    "heat": (
        {"class_path": "lightning_entropy.HeatSmoothing", "init_args": {"gamma": 1e4, "scale": "filter"}},
        lambda: le.HeatSmoothing(1, 1e4, scale="filter"),
    ),
    "widening": (
        {
            "class_path": "lightning_entropy.HeatSmoothing",
            "init_args": {
                "gamma": {
                    "class_path": "lightning_entropy.Widening",
                    "init_args": {"gamma": 1e4, "factor": 2.0, "steps": 5},
                }
            },
        },
        lambda: le.HeatSmoothing(1, le.Widening(1e4, 2.0, 5)),
    ),
    "late": (
        {
            "class_path": "lightning_entropy.HeatSmoothing",
            "init_args": {
                "width": {
                    "class_path": "lightning_entropy.Starting",
                    "init_args": {
                        "value": {"class_path": "lightning_entropy.Warmup", "init_args": {"value": 0.1, "steps": 5}},
                        "at": 0.88,
                    },
                },
                "scale": "relative",
            },
        },
        lambda: le.HeatSmoothing(width=le.Starting(le.Warmup(0.1, 5), at=0.88), scale="relative"),
    ),
    "pull": (
        entropy(inner_steps=5, gamma={"class_path": "lightning_entropy.Pull", "init_args": {"share": 0.5}}),
        lambda: le.EntropySGD(5, le.Pull(0.5)),
    ),
    "relaxation": (
        {
            "class_path": "lightning_entropy.InnerOuterCallback",
            "init_args": {"relaxation": {"inner_steps": 5, "outer_lr": 0.5, "gamma": SCOPING}},
        },
        lambda: le.InnerOuterCallback(le.Relaxation(inner_steps=5, outer_lr=0.5, gamma=le.Scoping(0.5, 0.1))),
    ),
    "schedule of one's own": (
        {
            "class_path": "lightning_entropy.InnerOuterCallback",
            "init_args": {
                "relaxation": {
                    "inner_steps": 5,
                    "gamma": {"class_path": "tests.lightning_modules.Staircase", "init_args": {"step": 0.5}},
                }
            },
        },
        lambda: le.InnerOuterCallback(le.Relaxation(inner_steps=5, gamma=Staircase(0.5))),
    ),
    "relaxation by class": (
        {
            "class_path": "lightning_entropy.InnerOuterCallback",
            "init_args": {
                "relaxation": {
                    "class_path": "lightning_entropy.Relaxation",
                    "init_args": {"inner_steps": 5, "outer_lr": 0.5},
                }
            },
        },
        lambda: le.InnerOuterCallback(le.lookahead()),
    ),
    "batchnorm": (
        {"class_path": "lightning_entropy.RefreshBatchNorm", "init_args": {"n_batches": 3}},
        lambda: le.RefreshBatchNorm(3),
    ),
}


@pytest.mark.filterwarnings("ignore:RefreshBatchNorm has nothing to do")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_callback_can_be_written_in_a_yaml_file(tmp_path: Path, name: str) -> None:
    config, make = CONFIGS[name]
    ran = cli(tmp_path, [config])
    expected = make()
    (callback,) = [c for c in ran.trainer.callbacks if type(c) is type(expected)]  # type: ignore[attr-defined]
    assert getattr(callback, "relaxation", 0) == getattr(expected, "relaxation", 0)
    twin = Automatic()
    trainer(callbacks=[expected]).fit(twin, loader())
    assert same(weights(ran.model), weights(twin))
    assert (tmp_path / "config.yaml").exists()


def test_from_the_command_line_itself(tmp_path: Path) -> None:
    ran = cli(tmp_path, [], "--trainer.callbacks+=lightning_entropy.EntropySGD", "--trainer.callbacks.gamma=0.5",
              "--trainer.callbacks.inner_steps=5")  # fmt: skip
    (callback,) = [c for c in ran.trainer.callbacks if isinstance(c, le.EntropySGD)]  # type: ignore[attr-defined]
    assert callback.relaxation == le.entropy_sgd(5, 0.5)


@pytest.mark.filterwarnings("ignore:RefreshBatchNorm has nothing to do")
def test_a_run_is_repeated_from_the_configuration_it_saved(tmp_path: Path) -> None:
    first = cli(tmp_path, [CONFIGS["scoping"][0], CONFIGS["batchnorm"][0]])
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    again = cli(tmp_path, saved["trainer"]["callbacks"])
    assert same(weights(first.model), weights(again.model))
