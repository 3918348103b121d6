"""Building the kernel: which compiler, and a clear error where there is none."""

import ctypes
import functools
import shutil

import pytest
import torch

import lightning_entropy as le
from lightning_entropy.engine.native import build, cpu


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CXX", "no-such-compiler", "got none: no-such-compiler"),
        ("CXX", "false --flag", "got from false"),
        ("PATH", "", r"got none: c\+\+ or g\+\+"),
        ("TMPDIR", "/dev/null/nowhere", "got from .*"),
    ],
)
def test_without_a_compiler_nothing_begins(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("tempfile.tempdir", value if variable == "TMPDIR" else None)
    monkeypatch.setattr(cpu, "kernel", functools.cache(build.kernel.__wrapped__))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=1.0)
    with pytest.raises(RuntimeError, match=f"compile=True needs a C.. compiler.*, {message}"):
        le.relax(optimizer, le.hamilton_jacobi(5, 0.5), compile=True)


NEEDS_A_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compile=True needs a C++ compiler"
)


@NEEDS_A_COMPILER
def test_a_blank_compiler_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", " ")
    assert build.kernel.__wrapped__().inner_step


@NEEDS_A_COMPILER
def test_the_kernel_is_built_once_and_loaded_with_its_arguments() -> None:
    library = build.kernel()
    assert build.kernel() is library
    assert library.inner_step.restype is None
    assert library.inner_step.argtypes == [ctypes.c_char_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int]
