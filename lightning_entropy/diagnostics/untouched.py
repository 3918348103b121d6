"""A module that is measured and left as it was: its mode, and the random numbers of the process."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from lightning_entropy.diagnostics.torch_internals import compiled


@contextmanager
def untouched(module: nn.Module, mode: str = "eval", seed: int = 0) -> Iterator[None]:
    """Put a module in a mode and seed every global generator, and put everything back on leaving.

    Covers the training flag of every submodule, the random states of torch (CPU and CUDA), numpy and Python, and
    the grad, inference and autocast modes. Where the module has recurrent layers cuDNN is off: its kernels for them
    cannot be differentiated twice, nor once in eval mode. Restores after an exception too.

    Args:
        module: Measured within the context.
        mode: "eval" or "train".
        seed: Of the global generators within the context.

    Yields:
        Nothing.

    Raises:
        ValueError: If ``mode`` is neither.

    Example:
        >>> net, before = nn.Dropout(), torch.get_rng_state()
        >>> with untouched(net):
        ...     _ = torch.rand(3), net.training
        >>> net.training, bool((torch.get_rng_state() == before).all())
        (True, True)
    """
    if mode not in ("eval", "train"):
        raise ValueError(f'mode must be "eval" or "train", got {mode!r}')
    flags = [(m, m.training) for m in module.modules()]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    kinds = {"cpu"} | {p.device.type for p in module.parameters()} & {"cuda", "mps", "xpu"}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            # By this flag alone: torch.backends.cudnn.flags() would set the others to its own defaults.
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False
        if compiled(module):
            # Compiled graphs cannot be differentiated twice.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            module.train(mode == "train")
            yield
        finally:
            for m, flag in flags:
                m.training = flag
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
            if cuda:
                torch.cuda.set_rng_state_all(cuda)
