"""The command for those who have a GPU, tried without one."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import page, replicas
from benchmarks.gpu.record import Piece, Row, finished, run


def piece(name: str, seconds: float = 0.0, *, done: list[str]) -> Piece:
    def work() -> list[Row]:
        done.append(name)
        if name.startswith("bad"):
            raise MemoryError("out of it")
        return [{"value": len(done)}]

    return Piece(name, seconds, work)


def test_what_is_there_is_not_done_again_and_what_does_not_fit_is_left(tmp_path: Path) -> None:
    file, done = tmp_path / "results.jsonl", list[str]()
    pieces = [piece("a", done=done), piece("long", 100.0, done=done), piece("b", done=done)]
    assert run(pieces, file, budget=10.0) == ["long"]
    assert done == ["a", "b"] and list(finished(file)) == ["a", "b"]
    assert run(pieces, file, budget=1000.0) == []
    assert done == ["a", "b", "long"]


def test_an_error_is_kept_and_tried_again(tmp_path: Path) -> None:
    file, done = tmp_path / "results.jsonl", list[str]()
    for _ in range(2):
        assert run([piece("bad", done=done), piece("good", done=done)], file, budget=10.0) == []
    assert done == ["bad", "good", "bad"]
    assert finished(file)["bad"]["error"] == "MemoryError: out of it"


def test_a_line_that_was_cut_off_counts_for_nothing(tmp_path: Path) -> None:
    file, done = tmp_path / "results.jsonl", list[str]()
    run([piece("a", done=done), piece("b", done=done)], file, budget=10.0)
    file.write_text(file.read_text()[:-10])
    assert list(finished(file)) == ["a"]
    run([piece("a", done=done), piece("b", done=done)], file, budget=10.0)
    assert done == ["a", "b", "b"]
    assert list(finished(file)) == ["a", "b"]


def test_rows_of_one_table_stand_together_and_text_is_escaped() -> None:
    entries: list[Row] = [
        {"piece": "one", "rows": [{"table": "both", "x": 0.12345}]},
        {"piece": "two", "rows": [{"table": "both", "x": [1.0, 12345.6]}]},
        {"piece": "three", "error": "RuntimeError: a < b"},
    ]
    assert page.tables(entries) == [
        ("both", [["x"], ["0.123"], ["1 to 12,346"]]),
        ("three", [["error"], ["RuntimeError: a < b"]]),
    ]
    assert "a &lt; b" in page.page("heading", {}, entries)
    assert "| 0.123 |\n| 1 to 12,346 |" in page.markdown("heading", {}, entries)


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compile=True needs a C++ compiler")
def test_the_whole_at_small_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "tested", lambda small: [{"said": "nothing"}])
    monkeypatch.setattr(command, "commit", lambda: "unknown")
    monkeypatch.setattr(replicas, "pieces", lambda device, small: [])
    arguments = ["--small", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main([*arguments, "--budget", "300"]) == 0
    said, _ = capsys.readouterr()
    (folder,) = tmp_path.iterdir()
    entries = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [entry["piece"] for entry in entries if "error" in entry] == []
    assert len(entries) == 10 and "- left: nothing" in said
    assert (folder / "README.md").read_text() == said[:-1]
    assert "<td>EntropySGD()</td>" in (folder / "index.html").read_text()


def test_without_a_gpu_it_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main([])
    assert "--device must be a device of this machine, got cuda, of which torch sees none" in capsys.readouterr().err
