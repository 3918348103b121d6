"""What is measured of weights is what it says."""

import dataclasses

import pytest
import torch
from torch import nn

from recipes.compare import run as run_module
from recipes.compare.measure import error_and_loss, loss_rise, reestimated
from tests.recipes.comparison import TASK, record_of

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
