"""What is asked of a device: every call of torch, and what of them makes the host wait. No GPU is needed."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_entropy.engine import filters, gaussian, noise
from lightning_entropy.strategies import exchange, fused

# What waits for the device: a value that the host reads, a shape that depends on one, and a copy to the host.
WAITS = (
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "is_nonzero",
    "to the host",
    "tolist",
    "numpy",
    "cpu",
)


class _Reads(TorchFunctionMode):
    """Count what reads a tensor on the CPU without a call that a dispatch mode sees."""

    NAMES = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.NAMES and args[0].dim() >= 0:
            self.counted["numpy" if name == "__array__" else name] += 1
        elif name == "to" and "cpu" in [a for a in (*args[1:], kwargs.get("device")) if isinstance(a, str)]:
            self.counted["cpu"] += 1
        return func(*args, **kwargs)


class Calls(TorchDispatchMode):
    """Count what torch is asked to do: no views and no memory without values, which start nothing on a device."""

    NOTHING = ("empty", "empty_like", "empty_strided", "_record_function_enter_new", "_record_function_exit")

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counter[str]()
        self._reads = _Reads(self.counted)

    def __enter__(self) -> "Calls":
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not (func.is_view or name in self.NOTHING):
            self.counted[name] += 1
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and result.is_cpu and not all(a.is_cpu for a in args if torch.is_tensor(a)):
            self.counted["to the host"] += 1
        return result

    @property
    def waits(self) -> Counter[str]:
        """Those that the host waits for."""
        return Counter({name: self.counted[name] for name in WAITS if self.counted[name]})


class Late:
    """An event that has not happened until somebody waits for it, it is let happen, or it has been asked for often."""

    def __init__(self, patience: float = math.inf) -> None:
        self.happened, self.waited, self.patience = False, False, patience

    def query(self) -> bool:
        self.happened = self.happened or self.patience <= 0
        self.patience -= 1
        return self.happened

    def synchronize(self) -> None:
        self.happened = self.waited = True


def late_copy(value: Tensor, *, patience: float = math.inf) -> tuple[Any, Late]:
    """A flag's copy in the host's memory, to read which no device is waited for, and when it is made."""
    copy = value.clone()
    with _disable_current_modes():
        return False if value.is_meta else bool(copy), Late(patience)


class Kernels:
    """In the place of a module of Triton kernels: counts launches, which write nothing."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> "Kernels":
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launched.append(grid)
        return lambda *given, **options: None


@contextmanager
def rounded_by_kernels() -> Iterator[Kernels]:
    """Let exchanges with ``compile=True`` launch kernels for tensors on the CPU, as for a GPU's."""
    kernels = Kernels()
    with patch.object(exchange, "is_fusible", lambda values: True), patch.object(fused, "kernels", lambda: kernels):
        yield kernels


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Make the choices that a GPU's parameters get, for those on the CPU."""
    filters.lengths_of.cache_clear()
    with (
        patch.object(gaussian, "has_streams", lambda p: False),
        patch.object(noise, "has_streams", lambda p: False),
        patch.object(filters, "one_by_one", lambda p: False),
        patch.object(exchange, "to_host", late_copy),
        patch.object(gaussian, "_generator", lambda device, seed: torch.Generator().manual_seed(seed)),
    ):
        yield
    filters.lengths_of.cache_clear()
