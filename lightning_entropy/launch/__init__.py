"""Replicas that come and go, on one machine: ``python -m lightning_entropy.launch --replicas 4 train.py``."""
