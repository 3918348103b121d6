"""The classifier: SAM against SAM written out, what BatchNorm remembers of it, schedules, flags, checkpoints."""

import itertools
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pytorch_optimizer import SAM
from torch import nn
from torch.nn import functional as F

from recipes.allcnn import AllCNN
from recipes.classifier import Classifier, Cosine, Drops, frozen_statistics
from recipes.compare.previous_sam import PreviousSAM
from recipes.data import ImageData

pytestmark = pytest.mark.filterwarnings("ignore")

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def fit(module, steps=5, data=None, **changes):
    arguments = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = L.Trainer(**arguments | changes)
    trainer.fit(module, datamodule=data or ImageData("random_grey", batch_size=64))
    return trainer


def batches(n):
    data = ImageData("random_grey", batch_size=64)
    data.setup()
    plans = data.train_dataloader()
    for epoch in range(n):
        plans.sampler.set_epoch(epoch)
        yield from (data.materialise(plan) for plan in plans)


def test_sam_is_sam_written_out():
    module = Classifier(small_net(), sgd, sharpness=0.05, schedule=Cosine())
    trainer = fit(module, steps=5)
    net = small_net()
    optimizer = sgd(net.parameters())
    for step, (images, labels) in zip(range(5), batches(1), strict=False):
        optimizer.param_groups[0]["lr"] = 0.1 * Cosine()(step / 5)
        here = torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters()))
        norm = torch.stack([g.square().sum() for g in here]).sum().sqrt()
        weights = [p.detach().clone() for p in net.parameters()]
        statistics = {name: b.clone() for name, b in net.named_buffers()}
        with torch.no_grad():
            for p, g in zip(net.parameters(), here, strict=True):
                p += 0.05 * g / norm
        uphill = torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters()))
        with torch.no_grad():
            for p, w, g in zip(net.parameters(), weights, uphill, strict=True):
                p.copy_(w)
                p.grad = g
            for name, b in net.named_buffers():
                b.copy_(statistics[name])
        optimizer.step()
    assert trainer.global_step == 5
    for (name, ours), (_, written) in zip(module.net.state_dict().items(), net.state_dict().items(), strict=True):
        torch.testing.assert_close(ours, written, rtol=1e-5, atol=1e-6, msg=name)
    plain = Classifier(small_net(), sgd, schedule=Cosine())
    fit(plain, steps=5)
    assert not torch.allclose(plain.net[0].weight, module.net[0].weight, atol=1e-4), "SAM is not SGD"


def test_previous_sam_is_written_out():
    module = Classifier(small_net(), sgd)
    fit(module, steps=5, callbacks=[PreviousSAM(0.3)])
    net, uphill = small_net(), None
    optimizer = sgd(net.parameters())
    for images, labels in itertools.islice(batches(1), 5):
        weights = [p.detach().clone() for p in net.parameters()]
        if uphill is not None:
            norm = torch.cat([g.flatten() for g in uphill]).norm()
            with torch.no_grad():
                for p, g in zip(net.parameters(), uphill, strict=True):
                    p += 0.3 * g / norm
        uphill = torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters()))
        with torch.no_grad():
            for p, w, g in zip(net.parameters(), weights, uphill, strict=True):
                p.copy_(w)
                p.grad = g.clone()
        optimizer.step()
    for ours, theirs in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_package_s_sam_under_automatic_optimization_is_the_previous_one():
    class Automatic(Classifier):
        def configure_optimizers(self):
            return SAM(self.parameters(), sgd, rho=0.3)

    package, ours = Automatic(small_net(), sgd), Classifier(small_net(), sgd)
    fit(package, steps=4)
    fit(ours, steps=4, callbacks=[PreviousSAM(0.3)])
    for theirs, p in zip(package.net.parameters(), ours.net.parameters(), strict=True):
        torch.testing.assert_close(theirs, p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sharpness", "start", "evaluations"), [(0.0, 0.0, 3), (0.05, 0.0, 6), (0.05, 0.6, 4)])
def test_gradient_evaluations_of_three_steps(sharpness, start, evaluations):
    module = Classifier(small_net(), sgd, sharpness=sharpness, sharpness_start=start)
    seen, gradients = [], []
    module.net.register_forward_pre_hook(lambda net, args: seen.append(args[0].sum().item()))
    module.net[0].weight.register_hook(lambda g: gradients.append(g.clone()))
    fit(module, steps=3, limit_val_batches=0)
    assert len(gradients) == evaluations
    if sharpness and not start:
        assert seen[::2] == seen[1::2], "both gradients are taken on the same batch"
        assert len(set(seen)) == 3
        assert not torch.equal(gradients[0], gradients[1]), "the second is taken elsewhere"


def test_batch_norm_counts_one_batch_a_step_under_sam():
    module = Classifier(small_net(), sgd, sharpness=0.05)
    fit(module, steps=4)
    assert module.net[1].num_batches_tracked == 4


def test_frozen_statistics_come_back_after_an_error():
    net = small_net().train()
    with pytest.raises(RuntimeError, match="in the middle"), frozen_statistics(net):
        raise RuntimeError("in the middle")
    assert net[1].track_running_stats


def test_sam_refuses_a_gradient_scaler():
    module = Classifier(small_net(), sgd, sharpness=0.05)
    module._trainer = type("T", (), {"precision": "16-mixed"})()
    with pytest.raises(MisconfigurationException, match="SAM needs precision"):
        module.configure_optimizers()


def test_sam_resumes_exactly(tmp_path):
    whole = Classifier(small_net(), sgd, sharpness=0.05)
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(whole, steps=6, enable_checkpointing=True, callbacks=[saver])
    rest = Classifier(small_net(), sgd, sharpness=0.05)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(rest, datamodule=ImageData("random_grey", batch_size=64), ckpt_path=tmp_path / "step=3.ckpt")
    for a, b in zip(whole.net.state_dict().values(), rest.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sharpness", [0.0, 0.05])
def test_the_schedule_runs_over_the_steps_of_the_run(sharpness):
    rates = []

    class Rate(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    schedule = Cosine(warmup=0.25, final=0.1)
    fit(Classifier(small_net(), sgd, schedule=schedule, sharpness=sharpness), steps=8, callbacks=[Rate()])
    assert rates == pytest.approx([0.1 * schedule(step / 8) for step in range(8)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(warmup=1.0), r"warmup must be in \[0, 1\), got 1.0"),
        (lambda: Cosine(final=2.0), r"final must be in \[0, 1\], got 2.0"),
        (lambda: Drops(at=(0.6, 0.3)), "at must increase"),
        (lambda: Drops(at=(0.5,), factor=0.0), r"factor must be in \(0, 1\], got 0.0"),
        (lambda: Classifier(nn.Identity(), sgd, sharpness=-1.0), r"sharpness must be in \[0, 1000\], got -1.0"),
        (lambda: Classifier(nn.Identity(), sgd, label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_data_with_other_classes_is_refused():
    with pytest.raises(ValueError, match="num_classes must be that of the data, 10, got 7"):
        fit(Classifier(small_net(), sgd, num_classes=7))


def test_it_learns_and_logs_and_predicts():
    module = Classifier(small_net(), sgd, label_smoothing=0.1)
    data = ImageData("random_grey", batch_size=64)
    trainer = fit(module, steps=40, data=data)
    assert trainer.callback_metrics["val_accuracy"] > 0.9
    assert {"train_loss", "train_accuracy", "val_loss"} <= set(trainer.callback_metrics)
    assert trainer.test(module, data, verbose=False)[0]["test_accuracy"] > 0.9
    probabilities = torch.cat(trainer.predict(module, data))
    assert probabilities.shape == (256, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(256))


def test_channels_last_and_bfloat16_reach_the_net():
    module = Classifier(AllCNN(width=4, channels=1), sgd, channels_last=True)
    seen = []
    module.net.layers[1].register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    fit(module, steps=1, precision="bf16-mixed", limit_val_batches=0)
    images, output = seen[0]
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert output.dtype == torch.bfloat16
    assert module.net.layers[4].weight.is_contiguous(memory_format=torch.channels_last)


def test_compile_keeps_the_names_of_the_weights(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: compiled.append(self))
    module = Classifier(small_net(), sgd, compile=True)
    names = list(module.state_dict())
    trainer = fit(module, steps=1)
    trainer.validate(module, ImageData("random_grey"), verbose=False)
    assert compiled == [module.net], "once, whatever the number of stages"
    assert list(module.state_dict()) == names
