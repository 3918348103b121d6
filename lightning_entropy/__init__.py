"""Local-entropy optimization for PyTorch Lightning."""

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_entropy.engine.loop import InnerOuter
from lightning_entropy.engine.relax import relax
from lightning_entropy.methods.presets import (
    diloco,
    elastic_sgd,
    entropy_sgd,
    gpa,
    hamilton_jacobi,
    heat,
    local_sgd,
    lookahead,
    palsgd,
    parle,
    smoothed_lookahead,
    snoo,
    streaming_diloco,
    two_timescale,
)
from lightning_entropy.methods.pull import Pull
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.methods.schedules import Scoping, Starting, Warmup, Widening
from lightning_entropy.strategies import ElasticEntropyFabricStrategy, ElasticEntropyStrategy
from lightning_entropy.trainer.batchnorm import RefreshBatchNorm
from lightning_entropy.trainer.callbacks import EntropySGD, HamiltonJacobi, HeatSmoothing
from lightning_entropy.trainer.inner_outer import InnerOuterCallback
from lightning_entropy.version import __version__ as __version__

__all__ = [
    "ElasticEntropyFabricStrategy",
    "ElasticEntropyStrategy",
    "EntropySGD",
    "HamiltonJacobi",
    "HeatSmoothing",
    "InnerOuter",
    "InnerOuterCallback",
    "Pull",
    "RefreshBatchNorm",
    "Relaxation",
    "Scoping",
    "Starting",
    "Warmup",
    "Widening",
    "diloco",
    "elastic_sgd",
    "entropy_sgd",
    "gpa",
    "hamilton_jacobi",
    "heat",
    "local_sgd",
    "lookahead",
    "palsgd",
    "parle",
    "relax",
    "smoothed_lookahead",
    "snoo",
    "streaming_diloco",
    "two_timescale",
]

# The one effect of the import: strategy="elastic_entropy" is a name. Registering again replaces: re-import is safe.
ElasticEntropyStrategy.register_strategies(StrategyRegistry)
ElasticEntropyFabricStrategy.register_strategies(STRATEGY_REGISTRY)
