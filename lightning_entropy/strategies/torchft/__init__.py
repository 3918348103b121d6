"""Replicas that come and go: whoever is there meets, by torchft's lighthouse."""
