"""Replicas: a strategy for the Trainer and one for Fabric, over one engine and one coupling."""

from lightning_entropy.strategies.elastic import ElasticEntropyStrategy
from lightning_entropy.strategies.fabric import ElasticEntropyFabricStrategy

__all__ = ["ElasticEntropyFabricStrategy", "ElasticEntropyStrategy"]
