"""The private names of torch that the diagnostics need, in one place. Checked against torch 2.6 to 2.14.

``tests/diagnostics/test_torch_internals.py`` fails when one of them changes.
"""

from torch import nn


def compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``nn.Module.compile`` was applied to the module or a part of it."""
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in module.modules())
