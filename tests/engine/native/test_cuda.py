"""compile=True on CUDA: the Triton kernel in Triton's interpreter, compiled for real, and absent. No GPU is needed."""

import copy
import inspect
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lightning_entropy.engine.native import cuda
from lightning_entropy.engine.native.rows import Noise, Numbers, Places, Update
from tests.device_calls import Calls
from tests.interpreter import run_interpreted

NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with a torch for CUDA alone")
CPU = torch.device("cpu")


@NEEDS_TRITON
def test_in_tritons_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted.py"))


@NEEDS_TRITON
@pytest.mark.parametrize("aligned", [True, False])
def test_it_compiles_for_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aligned: bool) -> None:
    """To a Hopper's binary, with fetches of four numbers where that is allowed, and all of it in registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_entropy.engine.native.triton_step import inner_step

    if "constexprs" not in inspect.signature(ASTSource).parameters:
        pytest.skip("Triton compiles without a GPU by another name before 3.3")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {"table": "*i64", "numbers": "*fp32", "blocks": "*i32", "average": "fp32"}
    source = ASTSource(
        fn=inner_step,
        signature={**kinds, "BLOCK": "constexpr", "ALIGNED": "constexpr"},
        constexprs={"BLOCK": cuda.BLOCK, "ALIGNED": aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    code = compiled.asm["ptx"]
    assert ("ld.global.v4" in code) == ("st.global.v4" in code) == aligned
    assert ".local" not in code


def test_without_triton_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lightning_entropy.engine.native.triton_step", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(cuda, "kernel", cuda.kernel.__wrapped__)
    with pytest.raises(RuntimeError, match=r"compile=True needs Triton on CUDA, got: .*triton"):
        cuda.TritonKernel([])


@NEEDS_TRITON
def test_a_triton_that_does_not_work_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise OSError("no C compiler")

    monkeypatch.setattr(cuda.TritonKernel, "run", fail)
    with pytest.raises(RuntimeError, match=r"compile=True needs a Triton that works, on CUDA, got: no C compiler"):
        cuda.TritonKernel([CPU])


@NEEDS_TRITON
def test_it_can_be_copied_and_pickled() -> None:
    kernel = cuda.TritonKernel([])
    for again in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        assert vars(again) == vars(kernel)


def test_a_launch_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = list[tuple[int, ...]]()

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launched.append(grid)
            return lambda *given, **options: None

    monkeypatch.setattr(cuda, "kernel", Launcher)
    kernel = cuda.TritonKernel([])
    places = Places([(64, 64, 0, 0)] * 3, [1, cuda.BLOCK + 1, 0], aligned=True)
    with Calls() as calls:
        for _ in range(3):
            kernel.run(CPU, places, [0] * 3, [Numbers(Update(), 0.5, Noise())] * 3, 0.75)
    assert launched == [(3,)] * 3
    assert not calls.waits
