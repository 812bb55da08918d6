"""The page and the screen of a run say what the run holds."""

import re

import numpy as np
import pytest
import torch
from rich.console import Console

from monitor.networks import ROWS, Weights, steps, tangent_noise, watched
from onsphere.monitor import Monitor, Run
from onsphere.monitor.rendering.html import document, to_html
from onsphere.monitor.rendering.terminal import screen


def sgd(p):
    return torch.optim.SGD(p, lr=0.01, weight_decay=0.1)


def sections(run):
    return {section.name: section for section in document(run).sections}


def test_measured_beside_expected(generator):
    run = watched(sgd, tangent_noise(generator), 4).run
    (panel,) = sections(run)["norm"].figures[0].panels
    measured, expected = panel.series
    assert (measured.label, measured.dashed) == ("measured", False)
    assert (expected.label, expected.dashed) == ("expected", True)
    np.testing.assert_allclose(measured.y, run.series("w", "norm"))
    np.testing.assert_allclose(expected.y, run.predicted("w", "norm"))
    np.testing.assert_allclose(measured.low, run.series("w", "norm", "q10"))
    (row,) = sections(run)["layers"].tables[0].rows
    cells = dict(zip(sections(run)["layers"].tables[0].columns, row, strict=True))
    assert cells["norm"] == run.series("w", "norm")[-1]
    assert cells["settles at"] == run.predicted("w", "equilibrium_norm")[-1]


def test_flags_and_missing_laws_are_told(generator):
    run = watched(lambda p: torch.optim.Rprop(p, lr=0.01), lambda *_: None, 4).run
    (row,) = sections(run)["flags"].tables[0].rows
    assert row[1:3] == ("dead", "w")
    (warning,) = document(run).warnings
    assert "No law covers Rprop" in warning
    assert len(sections(run)["norm"].figures[0].panels[0].series) == 1
    assert "no gradient" in shown(run)


def shown(run):
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(screen(run))
    return capture.get()


def deep(generator, layers, dead):
    names = [f"layer{k}" for k in range(layers)]
    net = Weights(**{n: torch.randn(2, 3, generator=generator) for n in names})
    optimizer = sgd(list(net.parameters()))
    noise = tangent_noise(generator)
    with Monitor(net, optimizer, dict.fromkeys(names, ROWS), every=1) as monitor:
        steps(optimizer, 3, lambda k, p: None if p is getattr(net, dead) else noise(k, p))
    return monitor.run


def test_a_deep_network_shows_what_is_flagged_and_a_choice_of_the_rest(generator):
    run = deep(generator, 50, "layer31")
    panels = [panel.title for panel in sections(run)["rotation"].figures[0].panels]
    assert len(panels) == 12
    assert {"layer0", "layer31", "layer49"} <= set(panels)
    assert "38 other layers" in sections(run)["rotation"].figures[0].caption
    assert len(sections(run)["layers"].tables[0].rows) == 50
    assert "10 more layers" in shown(run)


def test_the_page_needs_a_sample_for_pictures_only():
    run = Run({"name": "SGD"}, {"w": {}})
    assert "No step was sampled" in document(run).summary
    assert list(sections(run)) == ["flags", "layers"]
    assert "No step has been sampled" in shown(run)


def test_names_are_escaped_and_the_page_stands_alone(generator, tmp_path):
    pytest.importorskip("matplotlib")
    run = watched(sgd, tangent_noise(generator), 3, path=tmp_path / "run.jsonl").run
    text = (tmp_path / "run.jsonl").read_text().replace('"w"', '"<script>w"')
    (tmp_path / "run.jsonl").write_text(text)
    page = to_html(Run.read(tmp_path / "run.jsonl"), tmp_path / "run.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;w" in page
    assert not re.search(r'(src|href)="http', page)
    assert run.layers.keys() == {"w"}
