"""Where a report comes from, and all of its numbers as JSON."""

import json
import math
import platform
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import Namespace

from lightning_entropy.diagnostics.report.findings import SECTIONS, Findings, Subject
from lightning_entropy.diagnostics.report.rows import Row, difference, smaller
from lightning_entropy.diagnostics.report.verdict import pairs
from lightning_entropy.version import __version__

FORMAT = 1
# What has a line of its own, or is no setting of the measurement.
_TOLD = {"checkpoint", "first", "second", "module", "data", "output", "json", "image", "config", "loss", "device"}


def source_of(options: Namespace, paths: list[Path], subjects: list[Subject], device: str) -> dict[str, str]:
    """Return where the numbers of a report come from: date, versions, files, data and every setting, by name."""
    found = {
        "Measured": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "Versions": f"lightning_entropy {__version__}, torch {torch.__version__}, lightning {lightning.__version__}, "
        f"Python {platform.python_version()}",
        "Device": device,
    }
    for path, subject in zip(paths, subjects, strict=True):
        found[f"Checkpoint {subject.findings.title}"] = ", ".join([str(path), *subject.facts()])
    found["Module"] = str(options.module)
    found["Data"] = f"{options.data or options.module}; {subjects[0].data_facts()}"
    found["Loss"] = "cross entropy" if options.loss is None else str(options.loss)
    if options.config is not None:
        found["Configuration"] = str(options.config)
    flat = {name: value for name, value in vars(options.as_flat()).items() if name not in _TOLD}
    found["Settings"] = ", ".join(f"{name}={_short(value)}" for name, value in sorted(flat.items()))
    return found


def _short(value: Any) -> str:
    return "null" if value is None else str(value).replace(" ", "")


def record(findings: list[Findings], source: Mapping[str, str]) -> str:
    """Write every number of a report, with its error, as JSON.

    ``error`` is the half-width of the 99 % interval, ``stderr`` the standard error; null is what could not be measured.

    Args:
        findings: One, or two that are compared.
        source: Where they come from.

    Returns:
        The text.
    """
    checkpoints = []
    for finding in findings:
        sections = {}
        rows = finding.rows()
        for section in SECTIONS:
            if section in rows or section in finding.failed or section in finding.left:
                result = finding.results.get(section)
                sections[section] = {
                    "numbers": {row.name: _number(row) for row in rows.get(section, [])},
                    "scalars": {} if result is None else result.scalars(),
                    "examples_so_far": finding.left[section].examples if section in finding.left else None,
                    "budget_for_all": finding.left[section].budget if section in finding.left else None,
                    "failed": finding.failed.get(section),
                }
        checkpoints.append({"title": finding.title, "sections": sections})
    whole: dict[str, Any] = {"format": FORMAT, "interval": 0.99, "source": dict(source), "checkpoints": checkpoints}
    if len(findings) == 2:
        whole["differences"] = [_difference(section, a, b, findings) for section, a, b in pairs(*findings)]
    return json.dumps(_finite(whole), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _number(row: Row) -> dict[str, Any]:
    found = row.estimate
    return {"value": found.value, "error": found.error, "stderr": found.stderr, "meaning": row.meaning}


def _difference(section: str, a: Row, b: Row, findings: list[Findings]) -> dict[str, Any]:
    gap, best = difference(a, b), smaller(a, b)
    return {
        "section": section,
        "name": a.name,
        "value": gap.value,
        "error": gap.error,
        "stderr": gap.stderr,
        "smaller": None if best is None else findings[best].title,
        "smaller_is": a.better,
    }


def _finite(value: Any) -> Any:
    """Return a value that JSON can hold."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value
