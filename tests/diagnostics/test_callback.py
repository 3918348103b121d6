import random
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger

import lightning_entropy as le
from lightning_entropy.diagnostics import GradientNoise, HessianSpectrum, LocalEntropy, Trajectory, hessian_spectrum
from tests.diagnostics import tiny

pytestmark = tiny.LIGHTNING_ADVICE


def diagnostics(**when):
    """One of each, small; each draws random numbers and reads data."""
    return [
        HessianSpectrum(dense_limit=0, steps=4, probes=2, top=1, examples=20, **when),
        HessianSpectrum(mode="train", examples=20, data="val", name="train_mode", **when),
        LocalEntropy(samples=1, warmup=1, chains=2, leaps=1, draws=2, sigmas=(0.01,), examples=20, **when),
        GradientNoise(examples=20, **when),
        Trajectory(snapshots=128, **when),
    ]


def fit(callbacks, *, folder, seed=0, epochs=2, module=None, **settings):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    module = module or tiny.TinyModule()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **{"logger": False} | settings,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Trajectory needs at least 64")
        trainer.fit(module, datamodule=tiny.TinyData())
    return trainer, module


class Trace(pl.Callback):
    """Everything training could notice, after every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        tensors = [*pl_module.parameters(), *pl_module.buffers(), batch[0], outputs["loss"]]
        tensors += [p.grad for p in pl_module.parameters()]
        states = trainer.optimizers[0].state.values()
        tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        self.seen += [t.detach().clone() for t in tensors]
        self.seen.append(torch.get_rng_state())
        self.seen.append(torch.from_numpy(np.random.get_state()[1].astype(np.int64)))
        self.seen.append(torch.tensor(random.getstate()[1]))
        self.seen.append(torch.tensor([m.training for m in pl_module.modules()]))


@pytest.mark.parametrize("method", [None, "entropy_sgd"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_does_not_notice(tmp_path, method, precision):
    traces = []
    for with_diagnostics in (False, True):
        trace = Trace()
        extra = [le.EntropySGD(inner_steps=4, gamma=0.1)] if method else []
        # Whether it draws has nothing to do with the precision.
        drawing = precision == "32-true"
        measured = diagnostics(every_n_epochs=1, figures=drawing) if with_diagnostics else []
        fit([*extra, *measured, trace], folder=tmp_path, precision=precision)
        traces.append(trace.seen)
    assert len(traces[0]) == len(traces[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*traces, strict=True))
    assert all(m.result is not None for m in measured[:4])


def test_modes_and_gradients_are_left(tmp_path):
    """Frozen BatchNorm stays frozen, and accumulated gradients stay."""
    module = tiny.TinyModule()
    module.net[1].eval()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    hessian_spectrum(module, tiny.data(dtype=torch.float32), mode="train")
    assert module.training
    assert not module.net[1].training
    assert all((p.grad == 1).all() for p in module.parameters())
    assert all(torch.equal(b, buffers[name]) for name, b in module.named_buffers())


def test_a_failure_restores_too():
    module, state = tiny.TinyModule(), torch.get_rng_state()
    with pytest.raises(ValueError, match="loss must be finite"):
        hessian_spectrum(module, tiny.data(dtype=torch.float32), loss=lambda m, b: m(b[0]).sum() * float("nan"))
    assert module.training
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_measured_on_the_anchor(tmp_path):
    """In the middle of an inner loop the parameters hold y; what is measured is what a checkpoint would hold."""

    class MidLoop(HessianSpectrum):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 8:
                anchor = pl_module.state_dict()
                self.differ = any(not torch.equal(p, anchor[n]) for n, p in pl_module.named_parameters())
                own = tiny.TinyModule()
                own.load_state_dict(anchor)
                self.want = hessian_spectrum(own, trainer.train_dataloader, examples=20)
                self._run(trainer, pl_module)

    hessian = MidLoop(at_end=False, examples=20)
    fit([le.EntropySGD(inner_steps=5, gamma=0.1), hessian], folder=tmp_path)
    assert hessian.differ
    np.testing.assert_array_equal(hessian.result.eigenvalues, hessian.want.eigenvalues)


class Loud(Logger):
    """A logger that takes figures as TensorBoard does."""

    def __init__(self):
        super().__init__()
        self.metrics, self.figures = [], []

    name, version = "loud", "0"

    @property
    def experiment(self):
        return self

    def add_figure(self, tag, figure, step):
        figure.canvas.draw()
        self.figures.append((tag, step))

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_numbers_and_figures_reach_loggers(tmp_path):
    loud = Loud()
    measured = diagnostics(every_n_epochs=6)
    fit(measured, folder=tmp_path, epochs=12, logger=loud)
    logged = {key: step for step, metrics in loud.metrics for key in metrics}
    for key in (
        "hessian/largest",
        "hessian/trace_error",
        "train_mode/largest",
        "local_entropy/rise",
        "gradient_noise/rank_percent",
        "gradient_noise/temperature",
        "trajectory/current_significance",
    ):
        assert logged[key] == 71
    # Twice: the end of training is the end of the twelfth epoch. The path is too short after six.
    names = [tag for tag, _ in loud.figures]
    assert names.count("hessian") == names.count("gradient_noise") == 2
    assert {step for _, step in loud.figures} == {35, 71}
    assert measured[3].result.temperature == pytest.approx(0.1 / 16)
    assert not list(tmp_path.glob("**/*.png"))


def test_figures_go_to_files_where_no_logger_takes_them(tmp_path):
    fit(diagnostics()[:1], folder=tmp_path, epochs=1, logger=CSVLogger(tmp_path, name="run"))
    (picture,) = tmp_path.glob("run/version_0/diagnostics/hessian-step00000005.png")
    assert picture.stat().st_size > 5000
    assert "hessian/largest" in (tmp_path / "run/version_0/metrics.csv").read_text()


def test_trajectory_bounds_its_memory_and_resumes(tmp_path):
    recorded = Trajectory(snapshots=128, weights=10)
    trainer, _ = fit([recorded], folder=tmp_path, epochs=25)  # 150 steps
    assert recorded._interval == 2
    assert recorded._steps == list(range(2, 151, 2))
    assert recorded.path.shape == (75, 10)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"][recorded.state_key]

    again = Trajectory(snapshots=128, weights=10)
    again.load_state_dict(stored)
    trainer, _ = fit([again], folder=tmp_path, epochs=2)
    torch.testing.assert_close(again.path, recorded.path)  # Steps 1 to 12 are known.


def test_trajectory_records_what_is_asked(tmp_path):
    """Inner steps of 3: the anchor moves at every third step alone."""
    walks = {}
    for anchor in (False, True):
        recorded = Trajectory(anchor=anchor, weights=None)
        fit([le.EntropySGD(inner_steps=3, gamma=0.1), recorded], folder=tmp_path, epochs=1)
        walks[anchor] = recorded.path
    still = [bool((a == b).all()) for a, b in zip(walks[True], walks[True][1:], strict=False)]
    assert still == [True, False, True, True, False]
    assert not any(bool((a == b).all()) for a, b in zip(walks[False], walks[False][1:], strict=False))
    assert walks[True].shape[1] == sum(p.numel() for p in tiny.TinyModule().parameters())


def test_conflicts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="every_n_epochs must be None or at least 1, got 0"):
        HessianSpectrum(every_n_epochs=0)
    with pytest.raises(ValueError, match='data must be "train", "val" or a loader'):
        HessianSpectrum(data="test")
    with pytest.raises(ValueError, match='mode must be "eval" for gradients of single examples'):
        GradientNoise(mode="train")
    with pytest.raises(ValueError, match="snapshots must be at least 128, got 3"):
        Trajectory(snapshots=3)
    with pytest.warns(UserWarning, match=r"HessianSpectrum of TinyModule has failed: .*needs a val loader"):
        fit([HessianSpectrum(data="val")], folder=tmp_path, limit_val_batches=0)


def test_compiled_modules_are_measured(tmp_path):
    module = tiny.TinyModule()
    module.net.compile(backend="eager")
    assert hessian_spectrum(module, tiny.data(dtype=torch.float32)).largest != 0


def test_validation_outside_fit_allows_measuring():
    """Evaluation runs in inference mode, where autograd is off."""
    with torch.inference_mode():
        found = hessian_spectrum(tiny.net(), tiny.data())
    assert found.largest > 0


class Broken(HessianSpectrum):
    def measure(self, module, data, **settings):
        raise ZeroDivisionError("no number")


class Count(HessianSpectrum):
    """Say on every rank what this rank did."""

    calls = 0

    def measure(self, module, data, **settings):
        self.calls += 1
        return super().measure(module, data, **settings)

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        assert self.calls == (trainer.global_rank == 0)
        assert self.result.largest != 0


def ddp(callbacks, folder, strategy="ddp_fork"):
    return fit(callbacks, folder=folder, epochs=1, strategy=strategy, devices=2)


@pytest.mark.filterwarnings("ignore")
def test_computed_once_under_ddp(tmp_path):
    ddp([Count(examples=16)], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_computed_once_under_the_elastic_strategy(tmp_path):
    ddp([Count(examples=16), Trajectory(snapshots=128)], tmp_path, "elastic_entropy_fork")


@pytest.mark.filterwarnings("ignore")
def test_a_failure_ends_no_training(tmp_path):
    """Not of one process, and not of any of several."""
    with pytest.warns(UserWarning, match="Broken of TinyModule has failed: .*no number"):
        trainer, _ = fit([Broken(examples=16)], folder=tmp_path, epochs=2)
    assert trainer.current_epoch == 2
    ddp([Broken(examples=16)], tmp_path)
