"""Experiments of the talk as command lines; they use the public names of lightning_entropy alone."""

from importlib.util import find_spec

# Of the extra; where one is missing, ``python -m recipes.<name>`` ends with this line and no traceback.
_missing = [
    n for n in ("torchvision", "sklearn", "matplotlib", "jsonargparse", "pytorch_optimizer") if not find_spec(n)
]
if _missing:
    raise ModuleNotFoundError(f'the recipes need {", ".join(_missing)}: pip install -e ".[recipes]" in a checkout')
