"""Every public name is what it says, whatever is imported in whichever order: two functions share a folder's name."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys

import pytest

import lightning_entropy.diagnostics as diagnostics

FOLDERS = ["gradient_noise", "hessian", "local_entropy", "report", "trajectory"]


def test_each_name_is_a_function_or_a_class_after_every_file_was_imported() -> None:
    walked = [m.name for m in pkgutil.walk_packages(diagnostics.__path__, f"{diagnostics.__name__}.")]
    assert {f"{diagnostics.__name__}.{folder}" for folder in FOLDERS} <= set(walked)
    for name in walked:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    for name in diagnostics.__all__:
        assert not inspect.ismodule(getattr(diagnostics, name)), name
    assert callable(diagnostics.local_entropy)
    assert callable(diagnostics.gradient_noise)


# Every folder first, each in a process of its own, which has imported nothing of ours yet.
FIRST = """
import os, sys
import lightning.pytorch, torch

for first in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        __import__(f"lightning_entropy.diagnostics.{first}")
        from lightning_entropy import diagnostics as d
        assert d.local_entropy.__name__ == "local_entropy" and d.gradient_noise.__name__ == "gradient_noise"
        assert hasattr(d.local_entropy, "__code__") and hasattr(d.gradient_noise, "__code__")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, first
"""


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_each_function_is_one_where_its_folder_was_imported_first() -> None:
    names = ["local_entropy", "gradient_noise", "gradient_noise.estimator", "report.findings"]
    subprocess.run([sys.executable, "-c", FIRST, *names], check=True)
