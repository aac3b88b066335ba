"""The page of an evaluation: every score in its cell, hostile names harmless, and drawn without an error."""

# ruff: noqa: RUF001 (the page writes ranges with an en dash)

from __future__ import annotations

import re
from pathlib import Path

import pytest
import reports

from longwave.evaluation.ablation import Ablated, Ablation, Turned
from longwave.evaluation.few_shot import FewShot
from longwave.evaluation.outcome import Probes
from longwave.evaluation.recall import Recall, RecallScore
from longwave.intervals import Interval, wilson
from longwave.reports.recall import write_evaluation

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def score(length: int, depth: float | None, right: int, samples: int) -> RecallScore:
    return RecallScore(length, depth, samples, right, right / samples, wilson(right, samples), 0.5, 0.1)


def probes(name: str = "single") -> Probes:
    lengths = (512, 4096, 32768)
    places = [(row, length, place, depth) for row, length in enumerate(lengths) for place, depth in enumerate(DEPTHS)]
    cells = tuple(score(length, depth, min(5 * place + row, 20), 20) for row, length, place, depth in places)
    whole = tuple(score(length, None, 52 + place, 100) for place, length in enumerate(lengths))
    shot = FewShot(name, 4, 4, 0, 50, 0.5, wilson(25, 50), 0.5, 0.5, 0.5, 0.25, 0.3, {"a": 50}, {"a": 50})
    gone = Ablated("blocks.3.mixer", "L", 2.5, Interval(0.0, -0.0001, 0.0001), (Turned(name, 52, 52, 1, 1, 300),), True)
    ablation = Ablation(2.5, 64, {name: 52}, (gone,))
    return Probes(
        recall=(Recall(name, 0, whole, cells, (True,)), Recall("variables", 0, whole, (), (True,))),
        tasks=(shot,),
        ablation=ablation,
        command=f"longwave eval {name}",
        versions={"longwave": "0"},
    )


@pytest.mark.parametrize("name", ["single", reports.HOSTILE])
def test_every_score_is_in_its_cell(name: str, tmp_path: Path):
    write_evaluation(probes(name), tmp_path / "page.html", name, {"cpu": name})
    page = reports.drawn_file(tmp_path / "page.html")
    assert reports.is_ready(page)
    tables = re.findall(r'<table class="heat">.*?</table>', page, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", table) for table in tables]
    assert [len(one) for one in cells] == [3 * (len(DEPTHS) + 1), 3]
    assert cells[0][:6] == ["0–16", "11–47", "30–70", "53–89", "84–100", "52 %"]
    assert cells[1] == ["52 %", "53 %", "54 %"]
    assert "changes nothing" in page
    assert "<img src=x" not in page


def test_sections_without_data_are_left_out(tmp_path: Path):
    write_evaluation(Probes(command="longwave eval x"), tmp_path / "page.html", "x", {})
    page = reports.drawn_file(tmp_path / "page.html")
    assert reports.is_ready(page)
    for section in ("recall", "position", "tasks", "ablation"):
        assert re.search(rf'<section id="{section}"[^>]*hidden', page)
