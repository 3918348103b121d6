"""Rounding by Triton kernels: in Triton's interpreter, compiled for real, and counted. No GPU is needed."""

import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import lightning_entropy as le
from lightning_entropy.strategies import exchange
from lightning_entropy.strategies.compression import BLOCK, CODECS, EagerCodec, Entry, Format
from lightning_entropy.strategies.exchange import Coupling
from lightning_entropy.strategies.fused import LAYOUTS, FusedCodec, is_fusible
from lightning_entropy.strategies.links import Links
from tests.device_calls import Calls, as_on_a_gpu, rounded_by_kernels
from tests.engine.test_launches import resnet50
from tests.interpreter import run_interpreted
from tests.strategies.runs import FORK_WARNINGS, fit, strategy
from tests.strategies.test_exchange import meet

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with a torch for CUDA alone")
FORMATS = tuple(LAYOUTS)


@NEEDS_TRITON
@pytest.mark.processes
def test_in_tritons_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted.py"))


@NEEDS_TRITON
@pytest.mark.compiler
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernel", ["enter", "pass_on", "leave"])
def test_they_compile_for_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Format, kernel: str) -> None:
    """To a Hopper's binary in registers, which divides as IEEE does and rounds products before it subtracts them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_entropy.strategies import triton_rounding

    if "constexprs" not in inspect.signature(ASTSource).parameters:
        pytest.skip("Triton compiles without a GPU by another name before 3.3")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    layout = LAYOUTS[format]
    words = {torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8"}[layout.word]
    scales = "*fp32" if layout.levels else "*u8"
    constants = {"BLOCK": BLOCK, "BITS": layout.bits, "GROUP": layout.group, "LEVELS": layout.levels, "ROWS": 4}
    kinds = {"words": words, "own_words": words, "scales": scales, "own_scales": scales}
    kinds |= {"lost": "*u8", "size": "i32", "n": "i32", **dict.fromkeys(constants, "constexpr")}
    function = getattr(triton_rounding, kernel)
    source = ASTSource(
        fn=function,
        signature={name: kinds.get(name, "*fp32") for name in function.arg_names},
        constexprs={name: value for name, value in constants.items() if name in function.arg_names},
    )
    options = {"enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    code = compiled.asm["ptx"]
    assert ("div.rn.f32" in code) == (kernel != "leave" and layout.levels > 0)
    assert not any(word in code for word in (".local", "fma.", "div.full", "div.approx"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_bytes_of_the_others(format: Format) -> None:
    assert LAYOUTS[format].row(3 * BLOCK) == CODECS[format][0](torch.zeros(1, 3 * BLOCK))[0].nbytes


def test_they_are_for_float32_on_cuda() -> None:
    assert not is_fusible(torch.ones(3)) and not is_fusible(torch.ones(3, device="meta"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_launch_has_a_program_for_every_block_and_waits_for_nothing(format: Format) -> None:
    values, codec = torch.ones(5000, device="meta"), FusedCodec(format)
    with rounded_by_kernels() as kernels, Calls() as calls:
        given, left = codec.enter(values, Entry(values, None, values[:1] > 0), 3, 2 * BLOCK)
        given, _ = codec.pass_on(given, 2 * BLOCK, None)
        codec.leave(given.expand(3, -1), 2 * BLOCK)
    assert left.shape == values.shape
    assert kernels.launched == [(6,), (2,), (6,)]
    assert calls.counted == {"gt": 1}  # this test's own


@pytest.mark.processes
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_an_exchange_makes_at_most_twenty_calls(tmp_path: Path, format: Format, replicas: int) -> None:
    """Of both halves together, launches of ours among them; with both types of weights, whatever their number."""

    def work(rank: int) -> list[int]:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            for number in (10, 161):
                coupling = Coupling(Links(replicas, 1), format=format, compile=True)
                for _ in range(3):  # the first is whole, the second has no rounding error before it
                    tensors = [torch.randn(shape).to(dtype) for shape in resnet50(1)[:number]]
                    with as_on_a_gpu(), rounded_by_kernels() as kernels, Calls() as calls:
                        coupling(tensors)()
                assert len(kernels.launched) == 3
                found.append(calls.counted.total() + len(kernels.launched))
        return found

    for counts in meet(replicas, work, tmp_path):
        assert len(set(counts)) == 1 and counts[0] <= 17


@pytest.mark.compiler
@pytest.mark.processes
def test_compile_asks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def codec(format: Format) -> EagerCodec:
        (tmp_path / format).touch()
        return EagerCodec(format)

    monkeypatch.setattr(exchange, "is_fusible", lambda values: True)
    monkeypatch.setattr(exchange, "FusedCodec", codec)
    for compile in (False, True):
        fit(tmp_path, strategy(le.elastic_sgd(2, 0.5), communication_dtype="int8", compile=compile), 2)
        assert (tmp_path / "int8").exists() == compile
