"""An inner step in one pass over memory, by a small C++ kernel."""
