"""Build the C++ kernel of the inner step, for this processor, and load it."""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("step.cpp")
_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-shared", "-fPIC"]


@functools.cache
def kernel() -> ctypes.CDLL:
    """Build ``step.cpp`` for this processor and load it, once a process.

    The compiler is ``$CXX``, or else c++, g++ or clang++. Nothing is kept on disk.

    Raises:
        RuntimeError: there is no compiler, or it fails, or what it made cannot be loaded.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    compiler = next((command for command in candidates if shutil.which(command[0])), None)
    if compiler is None:
        names = " or ".join(command[0] for command in candidates)
        raise RuntimeError(f"compile=True needs a C++ compiler, got none: {names} is not to be found")
    # Some compilers know no native processor, or come without OpenMP; its threads are torch's own.
    extras = [["-march=native", "-fopenmp"]] if sys.platform == "linux" else []
    failures = []
    try:
        for extra in (*extras, ["-march=native"], []):
            with tempfile.TemporaryDirectory() as folder:
                built = Path(folder) / "inner_step.so"
                command = [*compiler, *_FLAGS, *extra, "-o", str(built), str(_SOURCE)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if not done.returncode:
                    return _load(built)
                failures.append(done.stderr.strip())
    except OSError as error:
        failures = [str(error)]  # no folder for temporary files ($TMPDIR), say, or one without programs
    raise RuntimeError(f"compile=True needs a C++ compiler that works, got from {compiler[0]}: {failures[0]}")


def _load(built: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(built))
    library.inner_step.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int]
    library.inner_step.restype = None
    return library
