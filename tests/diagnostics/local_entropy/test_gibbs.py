import pytest
import torch

from lightning_entropy.diagnostics.local_entropy.gibbs import gibbs_samples
from tests.diagnostics.local_entropy.functions import batched


def test_chain_keeps_the_variance_at_any_step():
    """Metropolis removes the step's error: variance T / (h + gamma) even with one big leap."""
    found = gibbs_samples(
        batched(lambda y: 4.5 * y.square().sum(1)),
        torch.zeros(1, dtype=torch.float64),
        gamma=1.0,
        temperature=0.2,
        samples=400,
        warmup=50,
        leaps=1,
        start=torch.zeros(500, 1, dtype=torch.float64),
        generator=torch.Generator().manual_seed(0),
    )
    # The virial of a quadratic is h <y^2>.
    assert found.virial.mean() == pytest.approx(9 * 0.2 / 10, rel=0.02)
    assert 0.6 < found.acceptance < 0.95
