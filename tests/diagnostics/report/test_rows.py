"""What stands beside the numbers of a report, by rule: whatever is measured, and however little of it is known."""

import html
import math
import re

import numpy as np
import pytest
import torch

from lightning_entropy.diagnostics import gradient_noise, hessian_spectrum, local_entropy
from lightning_entropy.diagnostics.report.findings import Findings, Left
from lightning_entropy.diagnostics.report.looks import rounded_up
from lightning_entropy.diagnostics.report.losses import loss_and_error
from lightning_entropy.diagnostics.report.page import failure, page, unfinished
from lightning_entropy.diagnostics.report.rows import ROWS
from lightning_entropy.diagnostics.trajectory import analyse_trajectory
from tests.diagnostics import tiny

VALLEY = {"samples": 2, "warmup": 1, "leaps": 1, "chains": 3, "draws": 3, "gamma": 10.0}


def circle(turns: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    angle = torch.linspace(0, 2 * math.pi * turns, 400, dtype=torch.float64)
    path = torch.stack([angle.cos(), angle.sin(), 0 * angle, 0 * angle], 1)
    return path + 0.3 * torch.randn(path.shape, generator=generator, dtype=torch.float64)


def results() -> dict[str, tuple[str, object]]:
    net, batches = tiny.net(), tiny.data()
    one_class = [(x, torch.zeros_like(y)) for x, y in batches]
    return {
        "loss": ("loss", loss_and_error(net, {"train": batches, "val": batches[:1]})),
        "loss of whole batches": (
            "loss",
            loss_and_error(net, {"val": batches}, loss=lambda m, b: m(b[0]).square().sum()),
        ),
        "dense Hessian": ("hessian", hessian_spectrum(net, batches, groups=4)),
        "Lanczos": ("hessian", hessian_spectrum(net, batches, groups=4, dense_limit=0, probes=4, steps=10)),
        "few products": ("hessian", hessian_spectrum(net, batches, dense_limit=0, probes=2, steps=3, products=2)),
        "no probes": ("hessian", hessian_spectrum(net, batches, dense_limit=0, probes=0)),
        "no eigenvalues": ("hessian", hessian_spectrum(net, batches, dense_limit=0, top=0, bottom=0, probes=2)),
        "local entropy": ("local_entropy", local_entropy(net, batches[:1], sigmas=[0.01, 0.1], groups=2, **VALLEY)),
        "no profile": ("local_entropy", local_entropy(net, batches[:1], **VALLEY | {"chains": 2})),
        "noise": ("gradient_noise", gradient_noise(net, batches, groups=4)),
        "noise, few examples": ("gradient_noise", gradient_noise(net, batches, examples=3)),
        "noise of one class": ("gradient_noise", gradient_noise(net, one_class, examples=8, groups=2)),
        "a circle": ("trajectory", analyse_trajectory(circle(30.0), interval=5)),
        "a short arc": ("trajectory", analyse_trajectory(circle(0.5)[:70])),
    }


RESULTS = results()


@pytest.mark.parametrize("name", RESULTS)
def test_every_number_has_a_sentence_on_how_to_read_it_and_an_error_that_is_said(name):
    section, result = RESULTS[name]
    rows = ROWS[section](result)
    assert len(rows) >= 2
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.meaning[0].isupper() or row.meaning[0] in "|λt", row
        assert row.meaning.endswith("."), row
        assert len(row.meaning.split()) >= 4 and "nan" not in row.meaning.lower().split(), row
        assert row.error >= 0 or math.isnan(row.error)
        # A number, or words for what could not be had; the error beside it unless it is exact.
        said = str(row)
        assert re.search(r"\d|not|unknown|∞|inf|nan", said), said
        if row.error > 1e-3 * abs(row.value) and math.isfinite(row.error) and math.isfinite(row.value):
            assert "±" in said, said
        if row.groups is not None:
            assert np.isfinite(row.groups.values).all() or not math.isfinite(row.value)


@pytest.mark.parametrize("name", RESULTS)
def test_the_page_and_its_tables_have_every_number_with_its_sentence(name):
    section, result = RESULTS[name]
    text = page([Findings("a", {section: result})])
    for row in ROWS[section](result):
        assert text.count(f'<th scope="row">{html.escape(row.name)}</th>') == 1
        assert "meaning" in text


@pytest.mark.parametrize("section", ["loss", "hessian", "local_entropy", "gradient_noise"])
def test_of_each_section_something_says_what_is_typical_or_what_to_compare_with(section):
    words = " ".join(row.meaning for kind, result in RESULTS.values() if kind == section for row in ROWS[kind](result))
    assert re.search(r"typical|often|chance is|about 0\.8", words), words


def test_the_sentences_fit_the_numbers():
    """Curvature and local entropy are verdicts only where a smaller number is a flatter minimum."""
    for section, result in RESULTS.values():
        for row in ROWS[section](result):
            assert row.better in (None, "flatter", "lower loss", "fewer errors")
            assert (row.better == "fewer errors") == row.name.endswith("error, %")
            if row.better == "flatter":
                assert section in ("hessian", "local_entropy")


def test_what_is_left_out_says_why_and_with_which_budget():
    assert unfinished(Left(64, 90)) == "a first look, on 64 examples; --budget 90 has time for all of it"
    assert unfinished(Left(0, 90)) == "not measured, for want of time; --budget 90 has time for all of it"
    assert unfinished(Left(0)) == "not measured, since the look was ended"
    assert unfinished(Left(1024)) == "a first look, on 1,024 examples"
    assert failure("ValueError: x", before=False) == "Not measured: ValueError: x"
    assert failure("ValueError: x", before=True).startswith("Not measured on more examples")
    for seconds in np.geomspace(0.1, 1e5, 200):
        assert seconds <= rounded_up(seconds) <= max(1.12 * seconds, 1.0 + seconds)
