"""Every public name is what it says, whatever is imported in whichever order: two functions share a folder's name."""

import importlib
import inspect
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


@pytest.mark.processes
@pytest.mark.parametrize("first", ["local_entropy", "gradient_noise", "gradient_noise.estimator", "report.findings"])
def test_each_function_is_one_where_its_folder_was_imported_first(first: str) -> None:
    code = (
        f"import lightning_entropy.diagnostics.{first}\n"
        "from lightning_entropy import diagnostics as d\n"
        "assert d.local_entropy.__name__ == 'local_entropy' and d.gradient_noise.__name__ == 'gradient_noise'\n"
        "assert hasattr(d.local_entropy, '__code__') and hasattr(d.gradient_noise, '__code__')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
