"""Experiments of the talk as command lines; they use the public names of lightning_entropy alone."""
