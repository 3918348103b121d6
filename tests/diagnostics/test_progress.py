import io
import sys

import pytest

from lightning_entropy.diagnostics.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("file", "show", "seen"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_a_bar_is_for_a_terminal(
    file: type[io.StringIO], show: bool, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = file()
    monkeypatch.setattr(sys, "stderr", written)
    with progress_bar("Eigenvalues", 3, show) as bar:
        if not bar.disable:
            bar.refresh()
    assert ("Eigenvalues" in written.getvalue()) == seen


def test_a_bar_waits_before_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    with progress_bar("Eigenvalues", 3, True) as bar:
        bar.update(3)
    assert "Eigenvalues" not in written.getvalue()
