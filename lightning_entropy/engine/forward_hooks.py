"""Perturb anew before the next forward pass, where a batch has several steps."""

from typing import Protocol

import torch
from torch.distributed.fsdp import FSDPModule
from torch.jit import ScriptModule
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from lightning_entropy.engine.state_dict_hooks import Hook


class ForwardListener(Protocol):
    """An object that has something to do before a forward pass that gradients come from."""

    def before_forward(self) -> None:
        """Do it."""


class BeforeForward(Hook[ForwardListener]):
    """Notify the listener of a forward pass, unless it is one without gradients."""

    def __call__(self, *_: object) -> None:
        """Do so."""
        listener = self.owner
        if listener is not None and torch.is_grad_enabled():
            listener.before_forward()


def listen(module: Module, listener: ForwardListener) -> list[RemovableHandle]:
    """Register a hook with every submodule that has parameters of its own, or gathers those of others (FSDP2).

    There it runs before all other hooks, so that weights are perturbed when they are gathered.

    Args:
        module: the whole one.
        listener: told before each of their forward passes. It is referred to weakly.

    Returns:
        The handles that remove the hooks.
    """
    gathers = {m: isinstance(m, FSDPModule) for m in module.modules() if not isinstance(m, ScriptModule)}
    having = [m for m in gathers if gathers[m] or next(m.parameters(recurse=False), None) is not None]
    return [m.register_forward_pre_hook(BeforeForward(listener), prepend=gathers[m]) for m in having]
