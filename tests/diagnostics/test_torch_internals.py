"""The private names of torch that the diagnostics rely on."""

import torch
from torch import nn

from lightning_entropy.diagnostics.torch_internals import compiled


def test_a_compiled_module_or_part_is_seen() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    assert not compiled(plain)
    assert compiled(torch.compile(plain, backend="eager"))
    assert compiled(nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager")))  # type: ignore[arg-type]
    plain[0].compile(backend="eager")
    assert compiled(plain)


def test_a_wrapper_of_torch_compile_calls_what_it_wraps() -> None:
    """``_orig_mod`` is the module itself, and not another thing of that name."""
    plain = nn.Linear(2, 2)
    assert torch.compile(plain, backend="eager")._orig_mod is plain  # type: ignore[attr-defined]
