"""Experiments of the talk as command lines; they use the public names of lightning_entropy alone."""

from importlib.util import find_spec

_missing = [name for name in ("torchvision", "sklearn", "matplotlib", "pytorch_optimizer") if not find_spec(name)]
if _missing:
    # Named after this package, python -m ends with the message; else with a traceback.
    raise ModuleNotFoundError(
        f'the recipes need {", ".join(_missing)}: pip install -e ".[recipes]" in a checkout', name="recipes"
    )
