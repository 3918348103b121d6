"""The version, for what must not import the package above it."""

__version__ = "0.2.0"
