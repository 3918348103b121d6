"""What is measured of weights is what it says."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from recipes.compare import run as run_module
from recipes.compare.judge import Judge
from recipes.compare.measure import calibration_error, corrupted, error_and_loss, loss_rise, pruned, reestimated
from tests.recipes.comparison import TASK, record_of
from tests.recipes.images import tree_data

pytestmark = pytest.mark.filterwarnings("ignore")


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


def test_what_is_stopped_in_time_has_the_weights_of_its_best_point(tmp_path):
    record = record_of("stopped", tmp_path, lr=1.0, task=dataclasses.replace(TASK, points=6))
    *points, last = [point["val_error"] for point in record["curve"]]
    assert last == min(points)
    plain = record_of("sgd", tmp_path, lr=1.0, task=dataclasses.replace(TASK, points=6))
    assert [p["val_error"] for p in plain["curve"]][:-1] == points[: len(plain["curve"]) - 1]
    assert not plain["curve"][-1]["val_error"] <= last  # it may be nan


def test_smoothed_labels_are_for_training_alone(tmp_path):
    records = [record_of(f"smoothed_labels:share={share}", tmp_path) for share in (0.0, 0.5)]
    plain = record_of("sgd", tmp_path)
    assert records[0]["final"] == plain["final"]
    assert records[1]["final"]["train_loss"] > plain["final"]["train_loss"]


def test_pruning_sets_the_smallest_weights_of_each_layer_to_zero_and_puts_them_back():
    net = nn.Sequential(nn.Conv2d(1, 2, (1, 5), bias=False), nn.Linear(1, 1)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([5.0, -1, 2, -9, 3, 8, -7, 4, 6, 10]).view(2, 1, 1, 5))
    before = [p.clone() for p in net.parameters()]
    with pruned(net, 0.6):
        assert net[0].weight.flatten().tolist() == [0, 0, 0, -9, 0, 8, -7, 0, 0, 10]
        assert net[1].weight.item() == 0
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_calibration_is_the_gap_between_confidence_and_accuracy():
    # Ten images of confidence 0.9, of which six are right.
    logits = torch.tensor([[9.0, 1.0]]).log().repeat(10, 1)
    labels = torch.tensor([0] * 6 + [1] * 4)
    assert calibration_error(nn.Identity(), [(logits, labels)], 2) == pytest.approx(0.3, abs=1e-6)


def test_corruption_blurs_and_adds_the_same_noise_for_every_net():
    images = torch.zeros(64, 1, 28, 28)
    images[:, :, 14, 14] = 100.0
    (first, _), (again, _) = (next(iter(corrupted([(images, None)]))) for _ in range(2))
    assert torch.equal(first, again)
    assert first[:, :, :5].std().item() == pytest.approx(0.3, rel=0.03)
    weights = torch.tensor([math.exp(-(i**2) / 2) for i in range(-2, 3)])
    peak = (100 * (weights / weights.sum())[2] ** 2).item()
    assert first[:, 0, 14, 14].mean().item() == pytest.approx(peak, abs=0.2)


def test_robustness_is_measured_on_images_of_every_class(tmp_path):
    """Files come class by class, and with two of four held out no more of the test images are taken than that."""
    data = tree_data(tmp_path, n_val=2)
    data.setup()
    judge = Judge(data, device=torch.device("cpu"), precision="32-true", eval_images=2, refresh_images=2)
    assert len(judge.some) == 2
    labels = [label for _, batch in judge._batches(judge.some) for label in batch.tolist()]
    assert labels == [0, 1]
    assert len(set(judge.some.tolist()) & set(data.test_indices.tolist())) == 2
