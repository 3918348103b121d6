"""Version 0.1's runs and checkpoints: what it computed is computed still, and what it saved still loads."""

import json
from pathlib import Path

import pytest

from tests.golden import record
from tests.strategies.runs import FORK_WARNINGS

pytestmark = [*(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS), pytest.mark.filterwarnings("ignore")]


def compare(found: dict[str, list[str]], recorded: dict[str, list[str]]) -> None:
    """Another processor may round a product or a logarithm differently: 1e-9, or the precision of the weights."""
    for name, values in found.items():
        tolerance = 1e-2 if "bfloat16" in name else 1e-4 if "float32" in name or "int8" in name else 1e-9
        for value, expected in zip(values, recorded[name], strict=True):
            a, b = (float.fromhex(v) if "x" in v else int(v) for v in (value, expected))
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance), name


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[str]]:
    content: dict[str, list[str]] = json.loads((record.HERE / "runs.json").read_text())
    return content


def test_every_run_is_as_it_was(recorded: dict[str, list[str]]) -> None:
    found = record.runs()
    compare(found, recorded)
    assert {name for name in recorded if not name.startswith("checkpoint")} == set(found)


def test_every_checkpoint_loads_and_trains_on_as_it_did(recorded: dict[str, list[str]]) -> None:
    found = record.from_checkpoints(Path(record.HERE) / "checkpoints")
    compare(found, recorded)
    assert {name for name in recorded if name.startswith("checkpoint")} == set(found)
