import numpy as np

from lightning_entropy.diagnostics.trajectory.control import ou_control
from lightning_entropy.diagnostics.trajectory.current import autocorrelation
from tests.diagnostics.trajectory.linear import linear_sde


def test_control_has_the_path_s_variance_and_memory():
    path, covariance = linear_sde(np.diag([0.9, 0.5]), np.eye(2), 20_000, 1, 5)
    control = ou_control(path[0], np.random.default_rng(0))
    np.testing.assert_allclose(control.var(0), np.diag(covariance), rtol=0.1)
    np.testing.assert_allclose(autocorrelation(control, 2)[1], [0.9, 0.5], atol=0.02)
