"""Replicas: a strategy for the Trainer and one for Fabric, on the same loops and exchanges."""

from lightning_entropy.strategies.fabric import ElasticEntropyFabricStrategy
from lightning_entropy.strategies.trainer import ElasticEntropyStrategy

__all__ = ["ElasticEntropyFabricStrategy", "ElasticEntropyStrategy"]
