"""The engine: the one loop of all methods, attached to an optimizer. Plain PyTorch; the only floor with state."""
