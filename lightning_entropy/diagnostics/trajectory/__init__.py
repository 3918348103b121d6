"""Does SGD walk in circles: the spectrum, the memory and the circulation of a path of weights."""

from lightning_entropy.diagnostics.trajectory.callback import Trajectory
from lightning_entropy.diagnostics.trajectory.current import ProbabilityCurrent, probability_current
from lightning_entropy.diagnostics.trajectory.estimator import analyse_trajectory
from lightning_entropy.diagnostics.trajectory.result import TrajectoryResult

__all__ = ["ProbabilityCurrent", "Trajectory", "TrajectoryResult", "analyse_trajectory", "probability_current"]
